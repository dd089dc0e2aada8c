"""What a method sees at a pruning point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.core.packing import take
from sparsevlm.core.scores import attention_rows
from sparsevlm.runtime.cache_state import extended, state_of
from sparsevlm.runtime.parts import part

if TYPE_CHECKING:
    from sparsevlm.runtime.prefill import Prefill


@dataclass
class ModuleInputs:
    """What scoring computed of a layer, for the layer to use.

    Attributes:
        layer: which.
        normed: [B, L, D] its normalised input.
        raw_keys: [B, L, H_kv * d] output of its k_proj.
        keys: [B, H_kv, L, d] the same rotated.
    """

    layer: int
    normed: Tensor
    raw_keys: Tensor
    keys: Tensor


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
    computed: ModuleInputs | None = field(default=None, init=False, repr=False)

    def visual(self) -> Tensor:
        """[B, V, D] states of the visual tokens."""
        return take(self.hidden, self.visual_index)

    def attention(self, tail: int) -> Tensor:
        """[B, H, tail, S] float32: the softmaxed attention of the last `tail` tokens to all keys of `module`.

        The layer's own norm and projections are used; its keys are handed to the layer, which does not compute them
        again. S counts the tokens of earlier turns, too.
        """
        p = self.prefill
        attention = p.family.decoder.layers[self.module].self_attn
        with torch.no_grad():
            made = self.module_inputs()
            cos, sin = self._tables()
            query = self._heads(attention.q_proj(made.normed[:, -tail:]), attention, "q_norm")
            query = p.family.rotate(query, cos[:, -tail:], sin[:, -tail:])
            key, mask, earlier = made.keys, p.key_mask, p.cached_keys(self.module)
            if earlier is not None:  # what the cache of `module` holds may differ from that of the layer before
                held = state_of(p.cache).at(self.module).key_mask
                new = None if mask is None else mask[:, -p.length :]
                mask = extended(held, earlier.shape[2], new, *self.hidden.shape[:2], self.hidden.device)
                key = torch.cat([earlier, key], 2)
            return attention_rows(query, key, attention.scaling, mask, p.family.window(self.module))

    def module_inputs(self) -> ModuleInputs:
        """Normalised input and keys of `module`, computed once."""
        if self.computed is None:
            layer, rotate = self.prefill.family.decoder.layers[self.module], self.prefill.family.rotate
            normed = layer.input_layernorm(self.hidden)
            with part(None):  # what the layer does not do again
                raw = layer.self_attn.k_proj(normed)
            key = self._heads(raw, layer.self_attn, "k_norm")
            self.computed = ModuleInputs(self.module, normed, raw, rotate(key, *self._tables()))
        return self.computed

    def _tables(self) -> tuple[Tensor, Tensor]:
        batch = self.hidden.shape[0]
        return tuple(t.expand(batch, -1, -1) for t in self.prefill.rope)

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
