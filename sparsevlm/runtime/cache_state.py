"""What pruning must remember between calls; it lives on the Cache object, so caches can be interleaved and copied."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass
class Segment:
    """Consecutive layers whose caches hold the same tokens.

    Attributes:
        key_mask: [B, cached] bool, which of them are real; None = all. Of a static cache [B, its whole length], True
            where nothing was written yet: it does not grow at each step, as a compiled step wants it.
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
        open_ended: whether the last call ended with an image, so that the next one may bring the rest of the prompt.
        pruned_by: the method that shortened this cache; None if nothing was dropped from it yet.
        broken: whether a call failed while it was shortened.
        admitted: whether the call being made knows of all this.
        dropped_at_input: by how much layer 0's cache is shorter than the input (methods that act before the language
            model); 0 if only the shorter samples of a batch lost tokens, None if none did.
        block: the one whose `visual_mask` marks a prompt in this cache; 0 = none (see `inputs.GivenMask`).
    """

    starts: list[int] = field(default_factory=lambda: [0])
    segments: list[Segment] = field(default_factory=lambda: [Segment()])
    dropped_at_input: int | None = None
    block: int = 0
    open_ended: bool = False
    pruned_by: str | None = None
    broken: bool = False
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


class _SeenTokens:
    """`cache.get_seq_length` that counts dropped input tokens, so that generate() slices inputs and numbers right.

    Asked for a layer by number, as the mask functions do, it still says what that layer holds.
    """

    def __init__(self, cache):
        self.cache = cache

    def __call__(self, layer_idx: int | None = None) -> int:
        cache = self.cache
        return seen_tokens(cache) if layer_idx is None else type(cache).get_seq_length(cache, layer_idx)


def report_seen_tokens(cache) -> None:
    """Let `cache.get_seq_length()` count dropped input tokens."""
    cache.get_seq_length = _SeenTokens(cache)


class _Guarded:
    """`update` of the first layer of a pruned cache, which nothing may write to that does not know what is missing."""

    def __init__(self, cache):
        self.cache, self.layer = cache, cache.layers[0]

    def __call__(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        state = state_of(self.cache)
        if not state.admitted:
            if int(type(self.layer).get_seq_length(self.layer)):
                _refuse(state, None)
            unlock(self.cache)  # it was emptied: a cache like any other
        return type(self.layer).update(self.layer, *args, **kwargs)


def lock(cache, method: str | None) -> None:
    """Refuse what does not know that `method` shortened this cache; None: it failed halfway, so refuse everything."""
    state = state_of(cache)
    state.pruned_by, state.broken = method or state.pruned_by, state.broken or method is None
    if cache.layers:
        cache.layers[0].update = _Guarded(cache)


def unlock(cache) -> None:
    """Forget all about a cache that is empty."""
    cache.sparsevlm = None
    cache.__dict__.pop("get_seq_length", None)
    if cache.layers and isinstance(cache.layers[0].__dict__.get("update"), _Guarded):
        del cache.layers[0].update


def admit(cache, method: str) -> CacheState | None:
    """Let the call being made go on with a cache that the same method shortened, or an empty one.

    Raises:
        ValueError: another method did.
    """
    state: CacheState | None = getattr(cache, "sparsevlm", None)
    if state is None or (state.pruned_by is None and not state.broken):
        return None
    if state.broken or state.pruned_by != method:
        if cached_length(cache, 0):
            _refuse(state, method)
        return None
    state.admitted = True
    return state


def _refuse(state: CacheState, method: str | None) -> None:
    if state.broken:
        raise ValueError("a call failed while this cache was being pruned, and left it half full. Use a new cache")
    now = f"not inside that of {method}" if method is not None else "not outside it"
    raise ValueError(
        f"this cache was pruned by {state.pruned_by}: its layers hold different tokens. Go on with it inside a `with` "
        f"block of that method, {now}"
    )


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
