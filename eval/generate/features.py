"""Projected features of pictures and videos, computed once and handed to `generate()` in place of the pixels.

Runs that differ in the method alone see the same features, unless the method acts in the vision tower or the projector.
Every picture is encoded by itself, so what comes out depends on nothing but the picture: whether it was computed now,
taken from memory, or in which batch it is asked, is the same to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eval.generate.lru import LeastRecentlyUsed
from sparsevlm.methods.base import Method
from sparsevlm.runtime.families import RECORDS

#: Inputs of `generate()` that hold pixels, and the kind of each.
KINDS = {"pixel_values": "image", "pixel_values_videos": "video"}
_BEFORE_THE_DECODER = ("vision_tower", "image_tower", "video_tower", "multi_modal_projector")


class FeatureStore:
    """Features of the pictures that were seen last, of one model.

    The key is the picture's pixels and their type; tower, projector and their numeric type are the model's, which a
    store does not outlive.

    Args:
        model: LLaVA or Video-LLaVA; its weights must not change.
        max_bytes: how much to keep in main memory; what was not used for longest goes first.

    Attributes:
        encoded, reused: how many pictures were computed, and taken from memory.
    """

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        self.model = model
        self.encoded = self.reused = 0
        self._kept = LeastRecentlyUsed(max_bytes)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, kind: str) -> list[Tensor] | Tensor:
        """What the model's `get_<kind>_features` makes of pictures [n, ...]: tensors [N, D], as a list or stacked."""
        parts = [self._one(picture[None], kind) for picture in pixels]
        if isinstance(parts[0], list):
            return [features for part in parts for features in part]
        return torch.cat(parts)

    def _one(self, picture: Tensor, kind: str):
        key = hashlib.blake2b(picture.contiguous().view(torch.uint8).numpy(), digest_size=16)
        key.update(f"{kind} {picture.dtype} {tuple(picture.shape)}".encode())
        key = key.digest()
        device = self.model.device
        kept = self._kept.get(key)
        if kept is not None:
            self.reused += 1
            return [t.to(device) for t in kept] if isinstance(kept, list) else kept.to(device)
        encode = getattr(self.model.base_model, f"get_{kind}_features")
        made = encode(picture.to(device, self.model.dtype), return_dict=True).pooler_output
        self.encoded += 1
        # Copies: a part of a batch would keep the whole of it in memory
        self._kept.put(key, [_copy(t) for t in made] if isinstance(made, list) else _copy(made), _size(made))
        return made


def _copy(features: Tensor) -> Tensor:
    return features.to("cpu", copy=True)


def _size(features: list[Tensor] | Tensor) -> int:
    return sum(t.nbytes for t in features) if isinstance(features, list) else features.nbytes


def encoder_outputs(store: FeatureStore, inputs: Mapping[str, Tensor]) -> dict[str, list[Tensor] | Tensor]:
    """Features of all pictures of a batch, by kind."""
    return {kind: store.encode(inputs[name], kind) for name, kind in KINDS.items() if name in inputs}


def as_argument(features: Mapping[str, list[Tensor] | Tensor]) -> dict[str, BaseModelOutputWithPooling]:
    """`mm_encoder_outputs` of one call of `generate()`, which changes what it is given."""
    return {
        kind: BaseModelOutputWithPooling(pooler_output=list(made) if isinstance(made, list) else made)
        for kind, made in features.items()
    }


def shares_features(model: nn.Module, method: Method) -> bool:
    """Whether a method hooks nothing before the language model, so that its runs can share features.

    False where a picture is not one row of the pixels and of the features (tiles, patches of all pictures in one
    list): there each run encodes its pictures itself.
    """
    if not RECORDS[model.config.model_type].grid:
        return False
    before = _hooks(model)
    with method(model):
        return _hooks(model) == before


def _hooks(model: nn.Module) -> int:
    base = model.base_model
    parts = [getattr(base, name) for name in _BEFORE_THE_DECODER if hasattr(base, name)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for part in parts for m in part.modules())
