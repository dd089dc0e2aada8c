"""What a method sees at a pruning point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.core.packing import take
from sparsevlm.core.scores import attention_rows

if TYPE_CHECKING:
    from sparsevlm.runtime.prefill import Prefill


@dataclass
class Stage:
    """One pruning point of one prefill.

    Attributes:
        prefill: the prompt it belongs to.
        layer: 0-based layer on whose output pruning acts; -1 = at the language model's input.
        module: layer whose norm and projections `attention` uses: `layer` itself, or the one after it.
        hidden: [B, L, D] states that enter `module` (for layer -1 the input embeddings).
        n_visual: visual tokens that enter, per sample.
        visual_index: [B, V] int64, their positions in `hidden`, V = the largest count.
        visual_valid: [B, V] bool, None = all.
    """

    prefill: Prefill
    layer: int
    module: int
    hidden: Tensor
    n_visual: list[int]
    visual_index: Tensor
    visual_valid: Tensor | None

    def visual(self) -> Tensor:
        """[B, V, D] states of the visual tokens."""
        return take(self.hidden, self.visual_index)

    def attention(self, tail: int) -> Tensor:
        """[B, H, tail, S] float32: the softmaxed attention of the last `tail` tokens to all keys of `module`.

        The layer's own norm and projections are used; unless gradients are recorded, its keys are handed to the layer,
        which does not compute them again. S counts the tokens of earlier turns, too.
        """
        with torch.no_grad():
            return self._attention(tail)

    def _attention(self, tail: int) -> Tensor:
        p = self.prefill
        family, attention = p.family, p.family.decoder.layers[self.module].self_attn
        normed = p.family.decoder.layers[self.module].input_layernorm(self.hidden)
        raw = attention.k_proj(normed)
        p.computed_keys = (self.module, raw)
        query = self._heads(attention.q_proj(normed[:, -tail:]), attention, "q_norm")
        key = self._heads(raw, attention, "k_norm")
        cos, sin = p.rope
        batch = self.hidden.shape[0]
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        query = family.rotate(query, query[:, :1], cos[:, -tail:], sin[:, -tail:])[0]
        key = family.rotate(key[:, :1], key, cos, sin)[1]
        earlier = p.cached_keys(self.module)
        if earlier is not None:
            key = torch.cat([earlier, key], 2)
        mask = p.key_mask if p.key_mask is None else p.key_mask[:, -key.shape[2] :]
        return attention_rows(query, key, attention.scaling, mask, family.window(self.module))

    def visual_columns(self, rows: Tensor) -> Tensor:
        """Columns [..., V] of the visual tokens of [B, ..., S] attention rows."""
        index = self.visual_index + (rows.shape[-1] - self.hidden.shape[1])
        index = index.view(index.shape[0], *[1] * (rows.dim() - 2), -1).expand(*rows.shape[:-1], -1)
        return rows.gather(-1, index)

    def _heads(self, x: Tensor, attention, norm: str) -> Tensor:
        """[B, L, H * d] -> [B, H, L, d], normalised where the family does (Qwen3)."""
        x = x.view(*x.shape[:2], -1, attention.head_dim)
        if hasattr(attention, norm):
            x = getattr(attention, norm)(x)
        return x.transpose(1, 2)
