"""Dropping tokens before the pruning layer computes them.

On the output of layer p a dropped token is gone, so within p it is needed only as a key and a value. Those of all
tokens are written into the cache of p first; the layer then runs on the surviving rows (kept tokens, recycling
candidates, text), takes keys and values from there, and masks by the rows' original order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparsevlm.core.packing import take
from sparsevlm.runtime.decision import Decision
from sparsevlm.runtime.masks import FixedMask
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.rows import Block
from sparsevlm.runtime.stage import Handed, Stage

if TYPE_CHECKING:
    from sparsevlm.runtime.prefill import Prefill

_BACKENDS = ("sdpa", "eager")  # those that take any mask


def can_drop_early(prefill: Prefill, decision: Decision, stage: Stage) -> bool:
    """Whether the layer's result is exactly that of the plain form."""
    family, cache, layer = prefill.family, prefill.cache, stage.layer
    if not prefill.method.early_drop or not decision.uniform or torch.is_grad_enabled():
        return False
    if decision.keep[0] + decision.pool[0] == stage.n_visual[0]:  # all that is dropped is recycled: no row to spare
        return False
    if family.window(layer) is not None or family.decoder.config._attn_implementation not in _BACKENDS:
        return False
    kind = type(cache.layers[layer]) if cache is not None and layer < len(cache.layers) else None
    return cache is None or kind is DynamicLayer or (kind is None and type(cache) is DynamicCache)


def drop_early(p: Prefill, decision: Decision, stage: Stage) -> tuple[Tensor, Decision]:
    """Give the layer the surviving rows only.

    Returns:
        the rows [B, L - dropped, D] that the layer shall compute, and the decision that remains for its output: to
        merge the recycling candidates and drop them.
    """
    made, key_mask = stage.module_inputs(), p.key_mask
    attention = p.family.decoder.layers[stage.layer].self_attn
    with part(None):  # what the layer does not do again
        raw_values = attention.v_proj(made.normed)
        keys, values = made.keys, stage.heads(raw_values, attention, "v_norm")
        if p.cache is not None:
            keys, values = p.cache.update(keys, values, stage.layer)
    alive, decision = p.select(decision, rope=True)
    with part("masks"):
        allowed = _allowed(alive, p.numbers[: stage.hidden.shape[1]], keys.shape[2], key_mask)
        # added to logits: backends would first make that of a mask of truth values, in more operators
        mask = p.lowest(stage.hidden.dtype).expand(allowed.shape).masked_fill(allowed, 0)
    # keys and values of the layer's own go nowhere: any will do
    outputs = {"k_proj": made.raw_keys[:, : p.length], "v_proj": raw_values[:, : p.length]}
    if made.raw_queries is not None and isinstance(p.rows, Block):  # else the last rows may be other ones now
        outputs["q_proj"] = made.raw_queries
    p.handed = Handed(stage.layer, outputs)
    p.segment_masks = FixedMask(mask, p.rope, keys, values)
    return take(stage.hidden, alive), decision


def _allowed(alive: Tensor, numbers: Tensor, n_keys: int, key_mask: Tensor | None) -> Tensor:
    """Every surviving row sees the earlier ones of the full sequence, and earlier turns.

    Args:
        alive: [B, N] int64, rows of the sequence.
        numbers: [L] all of its rows, the last ones of the keys.
        n_keys: keys, those of earlier turns included.
        key_mask: [B, n_keys] bool, False = padding; None = no padding.

    Returns:
        [B, 1, N, n_keys] bool.
    """
    allowed = numbers <= alive[..., None]
    if key_mask is not None:  # a padding row sees itself: no row without any key
        allowed &= key_mask[:, None, -len(numbers) :] | (numbers == alive[..., None])
    past = n_keys - len(numbers)
    if past:
        earlier = allowed.new_ones(1, 1, past) if key_mask is None else key_mask[:, None, -n_keys : -len(numbers)]
        allowed = torch.cat([earlier.expand(*alive.shape, -1), allowed], 2)
    return allowed[:, None]
