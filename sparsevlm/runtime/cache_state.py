"""What pruning must remember between calls; it lives on the Cache object, so caches can be interleaved and copied."""

from __future__ import annotations

import types
from bisect import bisect_right
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Segment:
    """Consecutive layers whose caches hold the same tokens.

    Attributes:
        key_mask: [B, cached] bool, which of them are real; None = all.
        places: [B, cached] int64, what sliding windows count in: the index that each token had before others were
            dropped; None = one after the other.
        shift: renumbering: by how much the newest token's position is lower than its original one: an int, or
            [B, 1] int64 where samples differ.
    """

    key_mask: Tensor | None = None
    shift: Tensor | int = 0
    places: Tensor | None = None


@dataclass
class CacheState:
    """Segments by their first layer.

    Attributes:
        dropped_at_input: by how much layer 0's cache is shorter than the input (methods that act before the language
            model); 0 if only the shorter samples of a batch lost tokens, None if none did.
        block: the one whose `visual_mask` marks a prompt in this cache; 0 = none (see `inputs.GivenMask`).
    """

    starts: list[int] = field(default_factory=lambda: [0])
    segments: list[Segment] = field(default_factory=lambda: [Segment()])
    dropped_at_input: int | None = None
    block: int = 0

    def at(self, layer: int) -> Segment:
        """The segment that `layer` belongs to."""
        return self.segments[bisect_right(self.starts, layer) - 1]

    def split(self, layer: int) -> Segment:
        """Make `layer` the first of a segment, with what it holds so far; returns that segment."""
        i = bisect_right(self.starts, layer) - 1
        if self.starts[i] != layer:
            self.starts.insert(i + 1, layer)
            self.segments.insert(i + 1, replace(self.segments[i]))
            i += 1
        return self.segments[i]

    def starts_own_masks(self, layer: int) -> bool:
        """Whether a segment starts here whose masks differ from those that the model makes for layer 0."""
        return layer in self.starts if layer else self.dropped_at_input is not None


def state_of(cache) -> CacheState:
    """The pruning state of a cache, made if it has none."""
    if getattr(cache, "sparsevlm", None) is None:
        cache.sparsevlm = CacheState()
    return cache.sparsevlm


def earlier_state(cache) -> CacheState | None:
    """A copy of the pruning state of a cache, which later changes leave alone; None if it has none."""
    state: CacheState | None = getattr(cache, "sparsevlm", None)
    if state is None:
        return None
    return replace(state, starts=list(state.starts), segments=[replace(s) for s in state.segments])


def cached_length(cache, layer: int) -> int:
    """Tokens that the cache of a layer holds (a host synchronisation for static caches only)."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())


def seen_tokens(cache) -> int:
    """Input tokens of earlier calls, those included that were dropped before layer 0."""
    held = cached_length(cache, 0)
    state = getattr(cache, "sparsevlm", None)
    return held + (state.dropped_at_input or 0) if held and state is not None else held


def report_seen_tokens(cache) -> None:
    """Let `cache.get_seq_length()` count dropped input tokens, so that generate() slices inputs and numbers right.

    Asked for a layer by number, as the mask functions do, it still says what that layer holds.
    """

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        return seen_tokens(self) if layer_idx is None else type(self).get_seq_length(self, layer_idx)

    cache.get_seq_length = types.MethodType(get_seq_length, cache)


def extended(
    key_mask: Tensor | None, cached: int, new: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Key mask [B, cached + length] of cached and new tokens; None if all are real.

    `key_mask` may be longer (the cache was cropped) or shorter (tokens came that nobody masked) than `cached`.
    """
    if key_mask is None and new is None:
        return None

    def ones(n: int) -> Tensor:
        return torch.ones(batch, n, dtype=torch.bool, device=device)

    old = ones(cached) if key_mask is None else key_mask[:, :cached].to(device)
    if old.shape[1] < cached:
        old = torch.cat([old, ones(cached - old.shape[1])], 1)
    return torch.cat([old, ones(length) if new is None else new], 1)
