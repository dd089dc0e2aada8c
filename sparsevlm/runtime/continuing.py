"""Calls that go on with a pruned cache: what their masks say, and masks and positions of each of its segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.runtime import inputs
from sparsevlm.runtime.cache_state import (
    CacheState,
    cached_length,
    extended,
    seen_tokens,
    state_of,
    static_length,
    whole,
)
from sparsevlm.runtime.gate import gate_step, visible
from sparsevlm.runtime.masks import SegmentMasks

if TYPE_CHECKING:
    from sparsevlm.runtime.hooks import Hooks


class Continuing:
    """What hooks do in such a call.

    Attributes:
        step: masks of the segment whose layer is next; None = the model's own.
        seen: input tokens before the call, where a sliding window needs them.
    """

    def __init__(self, hooks: Hooks):
        self.hooks = hooks
        self.step: SegmentMasks | None = None
        self.seen = 0

    def masks(self, i: int, hidden: Tensor, kwargs: dict, cache) -> SegmentMasks | None:
        """A call without visual tokens on a cache that was pruned: masks and positions of each segment."""
        state: CacheState | None = getattr(cache, "sparsevlm", None)
        if state is None:
            return None
        if i == 0:
            self.step = None
            self.seen = seen_tokens(cache) if self.hooks.family.sliding else 0
            self._check_step(state, hidden.shape[1], cache)
            self.settle_mask(hidden.shape[1], cache)
        if state.starts_own_masks(i):
            segment, (batch, n) = state.at(i), hidden.shape[:2]
            new = None
            if self._masks_new(n):
                new = self.hooks.mask[:, -n:].bool().to(hidden.device)
            if new is not None or (segment.key_mask is not None and static_length(cache, i) is None):
                cached = cached_length(cache, i)
                key_mask = extended(segment.key_mask, cached, new, batch, n, hidden.device)
                segment.key_mask = whole(key_mask, cache, i)
            rope = positions = None
            if isinstance(segment.shift, Tensor) or segment.shift:
                positions = kwargs["position_ids"] - segment.shift
                rope = self.hooks.family.decoder.rotary_emb(hidden, position_ids=positions)
            if segment.places is not None:
                new = (torch.arange(n, device=hidden.device) + (self.seen - segment.shift)).expand(batch, -1)
                segment.places = torch.cat([segment.places[:, : cached_length(cache, i)].to(hidden.device), new], 1)
            seen = segment.key_mask
            if segment.gate is not None:
                cached = cached_length(cache, i)
                seen = whole(visible(seen, extended(segment.gate, cached, None, batch, n, hidden.device)), cache, i)
            self.step = SegmentMasks(self.hooks.family, seen, cache, rope, positions, segment.places, segment.bias)
        if i == self.hooks.gated and state.pictured is not None:
            gate_step(self.hooks, state, i, hidden, cache)
        return self.step

    def _masks_new(self, n: int) -> bool:
        """Whether the mask says something of the call's `n` tokens; generate() hides none that it generates."""
        if not isinstance(self.hooks.mask, Tensor) or self.hooks.mask.dim() != 2:
            return False
        return n > 1 or (self.hooks.prompt_length is None and not inputs.all_real(self.hooks.mask[:, -n:]))

    def settle_mask(self, n: int, cache) -> None:
        """Compare what a 2D mask says of tokens that a pruned cache holds with what was known when it was pruned.

        Of tokens that came later it may say anything. Nothing is done for tokens that generate() generates, and at a
        single step of a loop of the caller's own only where the mask can be read without waiting for a device.
        """
        state, mask = self.hooks.cache_state, self.hooks.mask
        if state is None or not state.told or not isinstance(mask, Tensor | None):
            return
        if self.hooks.prompt_length is not None and (mask is None or mask.shape[1] > self.hooks.prompt_length):
            return
        if mask is not None and mask.dim() != 2:  # compared by `_check_step` and `_check_call`
            return
        inputs.check_told(mask, state, n, wait=n > 1 or self.hooks.prompt_length is not None)
        later = None if mask is None else mask[:, state.told : -n]
        if later is not None and later.shape[1] and not inputs.all_real(later):
            state.hide(later.bool(), cache)

    def _check_step(self, state: CacheState, n: int, cache) -> None:
        """Refuse a mask of the caller's own for `n` tokens on a pruned cache, unless it says what the cache knows."""
        if self.hooks.prompt_length is not None or self.hooks.mask is None:
            return
        if isinstance(self.hooks.mask, Tensor) and self.hooks.mask.dim() == 2:
            return
        if len(state.starts) == 1 and state.dropped_at_input is None:  # nothing was dropped
            return
        held = cached_length(cache, 0)
        new = inputs.key_mask_of(self.hooks.mask, self.hooks.mask, held, held, n)[:, -n:]
        key_mask = extended(state.segments[0].key_mask, held, new, len(new), n, new.device)
        inputs.check_mask(self.hooks.mask, self.hooks.family, key_mask, held, n)


def keep_first_mask(cache, key_mask: Tensor, length: int) -> Tensor:
    """Remember the padding of layer 0's cache, from which later segments split off, and return it."""
    state, new = state_of(cache), key_mask[:, -length:]
    if state.dropped_at_input is not None:
        first = state.segments[0].key_mask
        key_mask = extended(first, cached_length(cache, 0), new, *new.shape, new.device)
    state.segments[0].key_mask = whole(key_mask, cache, 0)
    return key_mask
