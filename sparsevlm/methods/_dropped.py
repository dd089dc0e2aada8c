"""Dropped tokens that are still computed, because a later ranking needs them (AIM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsevlm.core.packing import take
from sparsevlm.core.precision import at_least_float32
from sparsevlm.core.scores import attention_rows
from sparsevlm.runtime.stage import Stage


@dataclass
class Dropped:
    """Rows that attend to the remaining rows but to which no row attends, as if their keys were masked.

    Attributes:
        states: [B, G, D] that enter the layer of the next stage.
        tables: [B, G, 2 d] cos and sin of their positions, side by side.
        source: [B, G] int64, their numbers in the call's input.
        valid: [B, G] bool, which rows are real.
    """

    states: Tensor
    tables: Tensor
    source: Tensor
    valid: Tensor

    @classmethod
    def at(cls, stage: Stage, order: Tensor, keep: Sequence[int]) -> Dropped:
        """Take the rows that a stage drops: those behind the first `keep` of `order` [B, V]."""
        prefill, device = stage.prefill, order.device
        gone = torch.tensor([n - k for n, k in zip(stage.n_visual, keep, strict=True)], device=device)[:, None]
        column = torch.arange(max(n - k for n, k in zip(stage.n_visual, keep, strict=True)), device=device)
        place = torch.tensor(keep, device=device)[:, None] + column
        rows = stage.visual_index.gather(1, order.gather(1, place.clamp(max=order.shape[1] - 1)))
        tables = take(torch.cat(prefill.rope, -1), rows)
        return cls(take(stage.hidden, rows), tables, _source(stage).gather(1, rows), column < gone)

    def with_these(self, others: Dropped) -> Dropped:
        """Append `others`."""
        return Dropped(*(torch.cat([getattr(self, f.name), getattr(others, f.name)], 1) for f in fields(self)))

    def to(self, device: torch.device) -> Dropped:
        return Dropped(*(getattr(self, f.name).to(device) for f in fields(self)))

    def attention(self, stage: Stage) -> Tensor:
        """Compute their softmaxed attention [B, H, G, S] to the keys of the stage's layer, in at least float32."""
        prefill, length = stage.prefill, stage.hidden.shape[1]
        layer = prefill.family.decoder.layers[stage.module]
        query = stage.heads(layer.self_attn.q_proj(layer.input_layernorm(self.states)), layer.self_attn, "q_norm")
        query = prefill.family.rotate(query, *self.tables.chunk(2, -1))
        keys, mask = stage.keys()
        seen = _source(stage)[:, None] <= self.source[..., None]
        if mask is not None:
            seen = seen & mask[:, None, -length:]
        window = prefill.family.window(stage.module)
        if window is not None:
            seen = seen & (seen.flip(-1).cumsum(-1).flip(-1) <= window)
        past = keys.shape[2] - length
        if past:
            earlier = seen.new_ones(seen.shape[0], 1, past) if mask is None else mask[:, None, :past]
            seen = torch.cat([earlier.expand(-1, seen.shape[1], -1), seen], 2)
        dtype = at_least_float32(query.dtype)
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return attention_rows(query, keys, layer.self_attn.scaling, None, bias[:, None])

    def after(self, stage: Stage, attention: Tensor) -> Dropped:
        """Compute the rows after the stage's layer, given their attention in it."""
        layer, values = stage.prefill.family.decoder.layers[stage.module], stage.values()
        batch, heads, rows, length = attention.shape
        mixed = attention.to(values.dtype).view(batch, values.shape[1], -1, length) @ values
        mixed = mixed.view(batch, heads, rows, -1).transpose(1, 2).flatten(2)
        x = self.states + layer.self_attn.o_proj(mixed)
        return Dropped(x + layer.mlp(layer.post_attention_layernorm(x)), self.tables, self.source, self.valid)


def _source(stage: Stage) -> Tensor:
    """Return the [B, L] int64 numbers of the current rows in the call's input, ascending over the real ones."""
    prefill = stage.prefill
    if prefill.source is not None:
        return prefill.source
    return prefill.numbers[: stage.hidden.shape[1]].expand(stage.hidden.shape[0], -1)
