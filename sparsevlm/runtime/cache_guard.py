"""What a pruned cache refuses, and what it does besides: only calls that know what is missing may go on with it."""

from __future__ import annotations

from torch import Tensor

from sparsevlm.runtime.bias import LogitBias
from sparsevlm.runtime.cache_state import CacheState, cached_length, seen_tokens, state_of, static_length


class _SeenTokens:
    """`cache.get_seq_length` that counts dropped input tokens, so that generate() slices inputs and numbers right.

    Asked for a layer by number, as the mask functions do, it still says what that layer holds.
    """

    def __init__(self, cache):
        self.cache = cache

    def __call__(self, layer_idx: int | None = None) -> int:
        cache = self.cache
        return seen_tokens(cache) if layer_idx is None else type(cache).get_seq_length(cache, layer_idx)


class _Rows:
    """A method of a cache that chooses or repeats its rows, which does the same with what is known of them."""

    def __init__(self, cache, name: str):
        self.cache, self.name = cache, name

    def __call__(self, argument) -> None:
        cache = self.cache
        getattr(type(cache), self.name)(cache, argument)

        def follow(x):
            if isinstance(x, LogitBias):
                return x.of_rows(follow)
            if not isinstance(x, Tensor):
                return x
            if isinstance(argument, Tensor):
                return x.index_select(0, argument.to(x.device))
            return x.repeat_interleave(argument, 0) if self.name == "batch_repeat_interleave" else x[argument]

        state = state_of(cache)
        state.given, state.pictured, state.visual = map(follow, (state.given, state.pictured, state.visual))
        for segment in state.segments:
            for name, value in vars(segment).items():
                setattr(segment, name, follow(value))


_ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


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
    for name in _ROWS:
        setattr(cache, name, _Rows(cache, name))
    if cache.layers:
        cache.layers[0].update = _Guarded(cache)


def unlock(cache) -> None:
    """Forget all about a cache that is empty."""
    cache.sparsevlm = None
    for name in ("get_seq_length", *_ROWS):
        cache.__dict__.pop(name, None)
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
    if static_length(cache, 0) is None and not cached_length(cache, 0):  # it was reset
        unlock(cache)
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
