"""Masks: reading the caller's padding in any backend's format, and making masks for layers whose caches differ."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from sparsevlm.runtime.bias import LogitBias
from sparsevlm.runtime.families import Family


def padding_from(mask, past: int, length: int) -> Tensor | None:
    """Which keys are real, [B, past + length] bool, from a 2D mask or from sdpa's or eager's 4D one; None = all.

    A 4D mask is read on its diagonal (a real token sees itself, also under a sliding window); a key of an earlier turn
    is real if any row sees it.
    """
    if isinstance(mask, dict):  # models with several kinds of layers
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[:, 0]
        mask = mask if mask.dtype == torch.bool else mask == 0
        new = mask[..., past : past + length].diagonal(dim1=1, dim2=2)
        return torch.cat([mask[..., :past].any(1), new], 1)
    return mask[:, : past + length].bool()


def causal_mask(
    family: Family,
    layer: int,
    hidden: Tensor,
    key_mask: Tensor | None,
    cache,
    places: Tensor | None = None,
    skip: bool = True,
):
    """The mask of one layer in the backend's own format, sized for that layer's cache.

    `skip`: None where the mask is causal and no more, which the backend knows.
    A sliding window counts in `places` [B, cached + L] of the tokens (`Segment.places`); None = one after the other.
    No position_ids are passed: gaps in them would be taken for packed sequences (transformers masking_utils).
    """
    window = family.window(layer)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask

    def near(batch, head, query, key):
        last = places.shape[1] - 1  # static caches have room for more
        return places[batch, query.clamp(max=last)] - places[batch, key.clamp(max=last)] < window

    return make(
        and_mask_function=None if window is None or places is None else near,
        config=family.decoder.config,
        inputs_embeds=hidden,
        attention_mask=key_mask,
        past_key_values=cache,
        layer_idx=layer,
        allow_is_causal_skip=skip
        and key_mask is None,  # else every value of the mask is read on the host, at each step
    )


class SegmentMasks:
    """Keyword arguments for the layers of a segment: masks for its caches (one per kind of attention) and positions."""

    def __init__(
        self,
        family: Family,
        key_mask: Tensor | None,
        cache,
        rope=None,
        position_ids: Tensor | None = None,
        places: Tensor | None = None,
        bias: LogitBias | None = None,
    ):
        self.family, self.key_mask, self.cache, self.places = family, key_mask, cache, places
        self.rope, self.position_ids, self.bias = rope, position_ids, bias
        self._masks: dict = {}

    def kwargs(self, layer: int, hidden: Tensor) -> dict:
        """What replaces the model's own arguments in `layer`; must be asked before that layer runs."""
        kind = self.family.window(layer) if self.bias is None else layer == 0
        if kind not in self._masks:
            plain = self.bias is None
            mask = causal_mask(self.family, layer, hidden, self.key_mask, self.cache, self.places, plain)
            self._masks[kind] = mask if plain else self.bias.added_to(mask, layer, hidden.dtype)
        out = {"attention_mask": self._masks[kind]}
        if self.rope is not None:
            # gaps in position_ids look like packed sequences to FlashAttention; the rotation is in position_embeddings
            out |= {"position_ids": self.position_ids, "position_embeddings": self.rope}
        return out


class FixedMask:
    """Keyword arguments for one layer whose keys and values are computed: a mask of its own, to be added to logits."""

    def __init__(self, mask: Tensor, rope, keys: Tensor, values: Tensor):
        self.mask, self.rope, self.cache = mask, rope, _Computed(keys, values)

    def kwargs(self, layer: int, hidden: Tensor) -> dict:
        own = {"attention_mask": self.mask, "position_ids": None, "position_embeddings": self.rope}
        return {**own, "past_key_values": self.cache}


class _Computed:
    """Stands in for the cache in the one layer whose keys and values were written there before it ran."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.keys, self.values
