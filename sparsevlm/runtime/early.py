"""Dropping tokens before the pruning layer computes them.

On the output of layer p a dropped token is gone, so within p it is needed only as a key and a value. They are written
into the cache of p first; the layer then runs on the surviving rows (kept tokens, recycling candidates, text) under a
mask in terms of the rows' original order. Which rows of the cache hold which token does not matter to attention, but to
masks of later calls: padded batches get a segment of their own for p.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparsevlm.core.packing import pack, take
from sparsevlm.runtime.cache_state import state_of
from sparsevlm.runtime.decision import Decision
from sparsevlm.runtime.masks import FixedMask
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.stage import Stage

if TYPE_CHECKING:
    from sparsevlm.runtime.prefill import Prefill

_BACKENDS = ("sdpa", "eager")  # those that take any mask


def can_drop_early(prefill: Prefill, decision: Decision, stage: Stage) -> bool:
    """Whether the layer's result is exactly that of the plain form."""
    family, cache, layer = prefill.family, prefill.cache, stage.layer
    if not prefill.method.early_drop or not decision.uniform or torch.is_grad_enabled():
        return False
    if decision.keep[0] + decision.pool[0] == stage.n_visual[0]:  # everything that is dropped is recycled
        return False
    if family.window(layer) is not None or family.decoder.config._attn_implementation not in _BACKENDS:
        return False
    if decision.keep[0] + decision.pool[0] == stage.n_visual[0]:  # all that is dropped is recycled: no row to spare
        return False
    kind = type(cache.layers[layer]) if cache is not None and layer < len(cache.layers) else None
    return kind is DynamicLayer or (kind is None and type(cache) is DynamicCache)


def drop_early(prefill: Prefill, decision: Decision, stage: Stage) -> tuple[Tensor, Decision]:
    """Give the layer the surviving rows only.

    Returns:
        the rows [B, L - dropped, D] that the layer shall compute, and the decision that remains for its output: to
        merge the recycling candidates and drop them.
    """
    p = prefill
    stay = decision.keep[0] + decision.pool[0]
    length = p.length
    made = stage.module_inputs()
    flag = torch.zeros(p.batch, length, dtype=torch.uint8, device=p.device)
    flag.scatter_(1, p.visual_index.gather(1, decision.order[:, stay:]), 1)
    rows = flag.sort(dim=1, stable=True).indices  # survivors in order, then the dropped ones in order
    kept_length = length - (p.visual_index.shape[1] - stay)
    alive, gone = rows[:, :kept_length], rows[:, kept_length:]
    attention = p.family.decoder.layers[stage.layer].self_attn
    normed = take(made.normed, gone)
    with part(None):  # what the layer does not do again
        values = stage._heads(attention.v_proj(normed), attention, "v_norm")
    keys = take(made.keys.transpose(1, 2), gone).transpose(1, 2)
    earlier = p.cached_keys(stage.layer)
    past = 0 if earlier is None else earlier.shape[2]
    if p.cache is not None:
        p.cache.update(keys, values, stage.layer)
    # merged tokens go where the last visual token was, though it be dropped
    p.visual_end = (alive <= p.visual_index[:, -1:]).sum(1, keepdim=True) - 1
    with part("masks"):
        mask = _mask(p, alive, gone, past)
    _follow(p, decision, alive, gone, stay)
    p.segment_masks = FixedMask(p.family, mask, p.rope)
    p.handed = replace(made, raw_keys=take(made.raw_keys, alive))
    order = decision.order[:, :stay].argsort(1).argsort(1)  # old places among the visual tokens to new ones
    return take(stage.hidden, alive), replace(decision, order=order)


def _mask(p: Prefill, alive: Tensor, gone: Tensor, past: int) -> Tensor:
    """[B, 1, survivors, past + gone + survivors] bool: every row sees the earlier ones of the full sequence."""
    allowed = torch.cat([gone, alive], 1)[:, None] <= alive[..., None]
    if p.key_mask is not None:
        real = p.key_mask[:, p.key_mask.shape[1] - p.length :].gather(1, alive)
        # a padding row sees itself: no row without any key
        allowed[..., gone.shape[1] :] &= real[:, None] | torch.eye(alive.shape[1], dtype=torch.bool, device=p.device)
    if past:
        earlier = (
            allowed.new_ones(1, 1, past) if p.key_mask is None else p.key_mask[:, None, -p.length - past : -p.length]
        )
        allowed = torch.cat([earlier.expand(p.batch, alive.shape[1], -1), allowed], 2)
    return allowed[:, None]


def _follow(p: Prefill, decision: Decision, alive: Tensor, gone: Tensor, stay: int) -> None:
    """Let everything that is known per row follow the surviving rows."""
    dropped = gone.shape[1]
    if p.key_mask is not None:
        real = p.key_mask[:, -p.length :].gather(1, alive)
        if p.cache is not None:  # the cache of this layer is ordered otherwise than those around it
            own = [p.key_mask[:, : p.key_mask.shape[1] - p.length], torch.ones_like(gone, dtype=torch.bool), real]
            state_of(p.cache).split(decision.layer + 1)
            state_of(p.cache).split(decision.layer).key_mask = torch.cat(own, 1)
        p.key_mask = real
    p.tokens = [t - dropped for t in p.tokens]
    p.n_visual = [stay] * p.batch
    p.rope = take(p.rope[0], alive), take(p.rope[1], alive)
    p.source = p.source.gather(1, alive)
    p.visual_flag = p.visual_flag.gather(1, alive)
    p.visual_index = pack(p.visual_flag, stay)
    p.length = alive.shape[1]
