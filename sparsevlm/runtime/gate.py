"""Gating: generated tokens that later ones do not see, because a method does not write them to the cache.

A token always sees itself. In a batch samples decide differently, so that its slot stays in the cache and is masked
for the samples that do not write it: exact, but no memory is saved. Only conversations with pictures are gated, as only
those are pruned; prompts, also of later turns, never are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.runtime.cache_state import CacheState, cached_length, extended, seen_tokens, whole
from sparsevlm.runtime.parts import part

if TYPE_CHECKING:
    from sparsevlm.runtime.hooks import Hooks
    from sparsevlm.runtime.prefill import Prefill


def gate_prefill(prefill: Prefill, hidden: Tensor) -> Tensor | None:
    """Return the key mask [B, L] under which generated tokens of a call without a cache see what a cache would hold.

    None = nothing was generated yet. The last token stays: it sees itself.

    Raises:
        ValueError: candidates of assisted decoding behind the prompt.
    """
    count = prefill.prompt.generated
    if not count:
        return None
    if prefill.cache is not None:
        raise ValueError(_SEVERAL)
    with part("scores"):
        written = prefill.method.writes(prefill.attached, hidden[:, -count:-1])
    written |= ~pictured(prefill)
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if prefill.key_mask is not None:
        mask &= prefill.key_mask
    mask[:, -count:-1] &= written
    return mask


def pictured(prefill: Prefill) -> Tensor:
    """Return which prompts have pictures, [B, 1] bool: in a batch others are left alone, as they are by themselves."""
    return torch.tensor(prefill.prompt.n_visual, device=prefill.device)[:, None] > 0


def gate_step(hooks: Hooks, state: CacheState, layer: int, hidden: Tensor, cache) -> None:
    """Note which of the tokens [B, n, D] that enter the gated layer later ones will see.

    Raises:
        ValueError: several generated tokens at once.
    """
    batch, n = hidden.shape[:2]
    before = seen_tokens(cache) - n  # layer 0 has these tokens already
    generated = n == 1 if hooks.prompt_length is None else before >= hooks.prompt_length
    if not generated:  # the text of another turn
        return
    if n > 1:
        raise ValueError(_SEVERAL)
    with part("scores"):
        written = hooks.method.writes(hooks.attached, hidden)
    written |= ~state.pictured.to(written.device)
    segment, cached = state.at(layer), cached_length(cache, layer)
    gate = extended(segment.gate, cached, written, batch, n, hidden.device)
    segment.gate = whole(gate, cache, layer)


def visible(key_mask: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """Return which keys a step may see: those that are real and were written; the shorter mask is true behind its end.

    Args:
        key_mask, gate: [B, n] bool of different lengths; None = all.
    """
    if gate is None or key_mask is None:
        return key_mask if gate is None else gate
    out = key_mask.clone() if key_mask.shape[1] >= gate.shape[1] else gate.clone()
    both = min(key_mask.shape[1], gate.shape[1])
    out[:, :both] = key_mask[:, :both] & gate[:, :both].to(key_mask.device)
    return out


_SEVERAL = (
    "a method that decides which generated tokens are written to the cache needs them one at a time, and this call has "
    "several. Use gate=False with assisted decoding"
)
