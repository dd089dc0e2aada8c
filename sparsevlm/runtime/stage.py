"""What a method sees at a pruning point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.core.precision import at_least_float32
from sparsevlm.core.scores import attention_rows
from sparsevlm.runtime.cache_state import cached_length, extended, state_of
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.places import window_bias
from sparsevlm.runtime.rows import Block, HasRows, Scattered

if TYPE_CHECKING:
    from sparsevlm.runtime.prefill import Prefill


@dataclass
class ModuleInputs:
    """What scoring computed of a layer.

    Attributes:
        layer: which.
        normed: [B, L, D] its normalised input.
        raw_keys: [B, L, H_kv * d] output of its k_proj.
        keys: [B, H_kv, L, d] the same rotated.
        raw_queries: [B, T, H * d] output of its q_proj for the last T rows; None = not asked for.
    """

    layer: int
    normed: Tensor
    raw_keys: Tensor
    keys: Tensor
    raw_queries: Tensor | None = None


@dataclass
class Handed:
    """Outputs of the projections of the layer that comes next, so that it need not compute them.

    Attributes:
        layer: which.
        outputs: by projection, for the last rows of what the layer gets: all of them, or fewer.
    """

    layer: int
    outputs: dict[str, Tensor]

    @classmethod
    def whole(cls, made: ModuleInputs) -> Handed:
        """For a layer that computes every row."""
        outputs = {"k_proj": made.raw_keys}
        if made.raw_queries is not None:
            outputs["q_proj"] = made.raw_queries
        return cls(made.layer, outputs)


@dataclass
class Stage(HasRows):
    """One pruning point of one prefill. CONTRIBUTING.md lists what methods may use of it.

    Attributes:
        prefill: the prompt it belongs to.
        layer: 0-based layer on whose output pruning acts; -1 = at the language model's input.
        module: layer whose norm and projections `attention` uses: `layer` itself, or the one after it.
        hidden: [B, L, D] states that enter `module` (for layer -1 the input embeddings).
        rows: where the visual tokens are in `hidden`.
    """

    prefill: Prefill
    layer: int
    module: int
    hidden: Tensor
    rows: Block | Scattered
    computed: ModuleInputs | None = field(default=None, init=False, repr=False)

    @property
    def spared(self) -> bool:
        """Whether `module` is handed the keys that scoring computes: it has not run yet, and no row goes before it."""
        return self.module == self.layer and not self.prefill.method.scores_next

    def visual(self) -> Tensor:
        """[B, V, D] states of the visual tokens."""
        return self.rows.visual(self.hidden)

    def attention(self, tail: int) -> Tensor:
        """[B, H, tail, S] float32: the softmaxed attention of the last `tail` tokens to all keys of `module`.

        The layer's own norm and projections are used; these keys, and the queries of text behind the visual tokens, are
        handed to the layer, which does not compute them again. S counts the tokens of earlier turns, too.
        """
        p = self.prefill
        attention = p.family.decoder.layers[self.module].self_attn
        with torch.no_grad():
            made = self.module_inputs()
            cos, sin = self._tables()
            certain = tail <= p.tail  # rows that are certain to be computed
            with part(None if self.spared and certain else "scores"):
                raw = attention.q_proj(made.normed[:, -tail:])
            if certain:
                made.raw_queries = raw
            query = self.heads(raw, attention, "q_norm")
            query = p.family.rotate(query, cos[:, -tail:], sin[:, -tail:])
            key, mask = self.keys()
            dtype = at_least_float32(query.dtype)
            bias = window_bias(p, self.module, tail, key.shape[2] - p.length, dtype)
            return attention_rows(query, key, attention.scaling, mask, bias)

    def keys(self) -> tuple[Tensor, Tensor | None]:
        """[B, H_kv, S, d] rotated keys of `module`, those of earlier turns first; which are real [B, S], None = all."""
        p, key = self.prefill, self.module_inputs().keys
        mask, earlier = p.key_mask, p.cached_keys(self.module)
        if earlier is None:
            return key, mask
        # what the cache of `module` holds may differ from that of the layer before
        held, total = state_of(p.cache).at(self.module).key_mask, cached_length(p.cache, self.module)
        if held is not None:  # a sliding cache has the last ones
            held = held[:, total - earlier.shape[2] : total]
        new = None if mask is None else mask[:, -p.length :]
        mask = extended(held, earlier.shape[2], new, *self.hidden.shape[:2], self.hidden.device)
        return torch.cat([earlier, key], 2), mask

    def values(self) -> Tensor:
        """[B, H_kv, S, d] values of `module`, those of earlier turns first."""
        attention = self.prefill.family.decoder.layers[self.module].self_attn
        value = self.heads(attention.v_proj(self.module_inputs().normed), attention, "v_norm")
        earlier = self.prefill.cached_values(self.module)
        return value if earlier is None else torch.cat([earlier, value], 2)

    def mean_logits(self) -> Tensor:
        """[B, L, L] in at least float32: what `module` computes before mask and softmax, averaged over its heads.

        Of this call's tokens only. A mean of products is one product of all heads side by side.
        """
        p = self.prefill
        attention = p.family.decoder.layers[self.module].self_attn
        with torch.no_grad():
            made = self.module_inputs()
            with part(None):  # what the layer does not do again
                raw = attention.q_proj(made.normed)
            if not p.method.early_drop:  # else which rows it computes is not known yet
                made.raw_queries = raw
            query = p.family.rotate(self.heads(raw, attention, "q_norm"), *self._tables())
            dtype = at_least_float32(query.dtype)
            key = made.keys.to(dtype)
            query = query.to(dtype).unflatten(1, (key.shape[1], -1))
            scale = attention.scaling / (query.shape[1] * query.shape[2])
            query, key = (x.transpose(1, 2).flatten(2) for x in (query.sum(2), key))
            return query @ key.mT * scale

    def module_inputs(self) -> ModuleInputs:
        """Normalised input and keys of `module`, computed once."""
        if self.computed is None:
            layer, rotate = self.prefill.family.decoder.layers[self.module], self.prefill.family.rotate
            normed = layer.input_layernorm(self.hidden)
            with part(None if self.spared else "scores"):
                raw = layer.self_attn.k_proj(normed)
            key = self.heads(raw, layer.self_attn, "k_norm")
            self.computed = ModuleInputs(self.module, normed, raw, rotate(key, *self._tables()))
        return self.computed

    def _tables(self) -> tuple[Tensor, Tensor]:
        batch = self.hidden.shape[0]
        cos, sin = self.prefill.rope
        return cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)

    def visual_columns(self, rows: Tensor) -> Tensor:
        """Columns [..., V] of the visual tokens of [B, ..., S] attention rows."""
        return self.rows.columns(rows)

    def heads(self, x: Tensor, attention, norm: str) -> Tensor:
        """[B, L, H * d] -> [B, H, L, d], normalised where the family does (Qwen3)."""
        x = x.view(*x.shape[:2], -1, attention.head_dim)
        if hasattr(attention, norm):
            x = getattr(attention, norm)(x)
        return x.transpose(1, 2)
