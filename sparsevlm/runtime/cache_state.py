"""What pruning must remember between calls; it lives on the Cache object, so caches can be interleaved and copied."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparsevlm.runtime.bias import LogitBias


@dataclass
class Segment:
    """Consecutive layers whose caches hold the same tokens.

    Attributes:
        key_mask: [B, cached] bool, which of them are real; None = all. Of a static cache [B, its whole length], True
            where nothing was written yet: it does not grow at each step, as a compiled step wants it.
        places: [B, cached] int64, what sliding windows count in: the index that each token had before others were
            dropped; None = one after the other.
        bias: what is added to the logits of its keys; None = nothing.
        shift: renumbering: by how much the newest token's position is lower than its original one: an int, or
            [B, 1] int64 where samples differ.
        gate: [B, cached or fewer] bool, which of them were written for later ones to see (`runtime.gate`); None = all.
            As long as `key_mask` of a static cache.
    """

    key_mask: Tensor | None = None
    shift: Tensor | int = 0
    places: Tensor | None = None
    gate: Tensor | None = None
    bias: LogitBias | None = None


@dataclass
class CacheState:
    """Segments by their first layer.

    Attributes:
        open_ended: whether the last call ended with an image, so that the next one may bring the rest of the prompt.
        pruned_by: the method that shortened this cache; None if nothing was dropped from it yet.
        broken: whether a call failed while it was shortened.
        deltas: [B, 1] where text goes on in positions of several axes, as the model knew it; None = it has one axis.
        admitted: whether the call being made knows of all this.
        dropped_at_input: by how much layer 0's cache is shorter than the input (methods that act before the language
            model); 0 if only the shorter samples of a batch lost tokens, None if none did.
        told: input tokens that had come when tokens were dropped last: what a 2D mask says of these is settled. Later
            ones stand one after the other at the end of every layer's cache.
        given: [B, told] bool, which of them the caller called real; None = all.
        padded: whether some are padding.
        pictured: [B, 1] bool, which conversations had pictures, where generated tokens are gated (`runtime.gate`).
        visual: [B, told] bool, which keys are visual tokens, for methods that still ask once all is cached (`rereads`).
        block: the one whose `visual_mask` marks a prompt in this cache; 0 = none (see `inputs.GivenMask`).
    """

    starts: list[int] = field(default_factory=lambda: [0])
    segments: list[Segment] = field(default_factory=lambda: [Segment()])
    dropped_at_input: int | None = None
    told: int = 0
    given: Tensor | None = None
    padded: bool = False
    pictured: Tensor | None = None
    visual: Tensor | None = None
    block: int = 0
    open_ended: bool = False
    pruned_by: str | None = None
    broken: bool = False
    deltas: Tensor | None = None
    admitted: bool = False

    def at(self, layer: int) -> Segment:
        """The segment that `layer` belongs to."""
        return self.segments[self._index(layer)]

    def _index(self, layer: int) -> int:
        return sum(start <= layer for start in self.starts) - 1  # not bisect, which torch.compile cannot trace

    def split(self, layer: int) -> Segment:
        """Make `layer` the first of a segment, with what it holds so far; returns that segment."""
        i = self._index(layer)
        if self.starts[i] != layer:
            self.starts.insert(i + 1, layer)
            self.segments.insert(i + 1, replace(self.segments[i]))
            i += 1
        return self.segments[i]

    def tell(self, told: int, key_mask: Tensor | None, length: int, padded: bool) -> None:
        """Note what a call whose `length` tokens are the last of `told` says of them: [B, told or fewer] bool."""
        if padded and key_mask.shape[1] < told:  # made for a cache that is shorter than the input
            new = key_mask[:, -length:]
            key_mask = extended(self.given, told - length, new, *new.shape, new.device)
        self.told, self.given, self.padded = told, key_mask if padded else None, padded

    def hide(self, real: Tensor, cache) -> None:
        """Take what a mask [B, n] says of the last n tokens in the cache, which came after it was pruned."""
        for layer, segment in zip(self.starts, self.segments, strict=True):
            new = real.to(cache.layers[layer].keys.device)
            before = cached_length(cache, layer) - real.shape[1]
            segment.key_mask = whole(extended(segment.key_mask, before, new, *new.shape, new.device), cache, layer)

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


def static_length(cache, layer: int) -> int | None:
    """Tokens that the cache of a layer has room for; None if it grows or slides."""
    if cache is None or layer >= len(cache.layers) or cache.layers[layer].is_sliding:
        return None
    length = cache.get_max_length(layer)
    return length if length >= 0 else None


def whole(key_mask: Tensor | None, cache, layer: int) -> Tensor | None:
    """A key mask as `Segment` keeps it."""
    length = static_length(cache, layer) if key_mask is not None else None
    if length is None or key_mask.shape[1] >= length:
        return key_mask
    return nn.functional.pad(key_mask, (0, length - key_mask.shape[1]), value=True)


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
