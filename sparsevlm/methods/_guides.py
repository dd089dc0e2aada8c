"""Finding the guide of `sgl`, and seeing that it fits the model."""

from __future__ import annotations

import copy
import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsevlm.runtime.families import Family, locate
from sparsevlm.runtime.towers import TOWERS, find_towers

SHIPPED = "mini-guide"
#: By decoder of the model: name, dtype and device of the guide that was loaded for it last, and the guide itself.
_loaded_for: WeakKeyDictionary[nn.Module, tuple[tuple, nn.Module]] = WeakKeyDictionary()


def find_guide(guide: Any, shared: bool | None, family: Family) -> tuple[Family, bool]:
    """Load the guide of a model, and find out whether it shares the model's tower.

    Args:
        guide, shared: see `sgl.SGL`.
        family: of the model.

    Raises:
        ValueError: there is none, or it does not fit the model.
        FileNotFoundError, ConnectionError, PermissionError: as `sparsevlm.load`.
    """
    shipped = guide is None
    if isinstance(guide, str) and guide == "self":
        guide = family.model
    if shipped:
        if not _is_mini(family):
            raise ValueError(
                "method 'sgl' needs a guide. Use guide=<a small model, its folder or hub id>, or guide=\"self\""
            )
        guide = SHIPPED
    if not isinstance(guide, str | os.PathLike | nn.Module):
        raise ValueError(f'guide must be a model, a folder, a hub id or "self", not {guide!r}')
    found = locate(guide) if isinstance(guide, nn.Module) else None
    if found is not None and found.decoder is family.decoder:
        return found, True
    found = locate(_loaded(guide, family))
    _check_fits(found, family)
    if shared is False:
        return found, False
    known = next(family.decoder.parameters()).is_meta and (shared or shipped)  # no weights that could be compared
    different = None if known else _different(found, family)
    if shared and different:
        raise ValueError(f"shared=True, but the guide's {different} is not the model's. Leave shared out")
    return found, different is None


def _is_mini(family: Family) -> bool:
    """Whether the model is the embedded one, or another training of it: the same words and pictures."""
    from sparsevlm.mini.model import build_config

    config, mini = family.outer.config, build_config()
    if config.model_type != mini.model_type:
        return False
    return all(
        getattr(part, name) == getattr(own, name)
        for part, own, names in (
            (config, mini, ("image_token_index",)),
            (config.text_config, mini.text_config, ("vocab_size", "hidden_size", "eos_token_id")),
            (config.vision_config, mini.vision_config, ("image_size", "patch_size", "hidden_size")),
        )
        for name in names
    )


def _loaded(guide: Any, family: Family) -> nn.Module:
    """A checkpoint in the dtype and on the device of the model, which keeps it: a folder is read once per model. Where
    the model has no weights (on the meta device, to count multiply-adds), the guide has none either."""
    from sparsevlm.models.checkpoint import find_checkpoint, read_config
    from sparsevlm.models.loading import load

    weight = next(family.decoder.parameters())
    named = isinstance(guide, str | os.PathLike)
    if not weight.is_meta:
        if not named:
            return guide
        key = str(guide), weight.dtype, weight.device
        if family.decoder not in _loaded_for or _loaded_for[family.decoder][0] != key:
            _loaded_for[family.decoder] = key, load(guide, dtype=weight.dtype, device=weight.device)[0]
        return _loaded_for[family.decoder][1]
    from sparsevlm.cost.counters import without_weights

    config = read_config(find_checkpoint(guide)) if named else copy.deepcopy(guide.config)
    return without_weights(config, weight.dtype).requires_grad_(False)


def _check_fits(guide: Family, model: Family) -> None:
    """Raise ValueError unless a guide reads the same words and pictures as the model."""
    if not guide.visual_ids:
        raise ValueError("the guide has no vision tower. Use a small model of the same kind as the large one")
    if not model.visual_ids:
        raise ValueError(
            "a text model is given inputs_embeds, which a guide with weights of its own cannot read. Use "
            'guide="self", or a LLaVA model'
        )
    words = [f.decoder.config.vocab_size for f in (guide, model)]
    if words[0] != words[1] or guide.visual_ids != model.visual_ids:
        raise ValueError(
            f"the guide has another vocabulary ({words[0]} words, pictures at {guide.visual_ids}) than the model "
            f"({words[1]}, {model.visual_ids}). Use a guide that was trained with the model's tokenizer"
        )
    towers = [{tower.kind: tower for tower in find_towers(family, "sgl")} for family in (guide, model)]
    for kind, tower in towers[1].items():
        other = towers[0].get(kind)
        if other is None:
            raise ValueError(f"the guide sees no {kind}s, the model does. Use a guide of the model's kind")
        if other.tokens != tower.tokens:
            raise ValueError(
                f"guide sees {other.tokens} visual tokens, the model {tower.tokens}. Use a guide with the same number"
            )
        sides = [t.module.config.image_size for t in (other, tower)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"the guide reads pictures of {sides[0]} pixels, the model of {sides[1]}. Use a guide of the same size"
            )


def _different(guide: Family, model: Family) -> str | None:
    """The first part in which two models differ of those that they would share; None = in none."""
    parts = (*TOWERS, "multi_modal_projector", "word embeddings")
    for name in parts:
        pair = [
            f.decoder.get_input_embeddings() if name == "word embeddings" else getattr(f.outer, name, None)
            for f in (guide, model)
        ]
        if pair == [None, None]:
            continue
        if None in pair or not _equal(*(module.state_dict() for module in pair)):
            return name
    return None


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        x.shape == other[name].shape and not x.is_meta and torch.equal(x, other[name].to(x)) for name, x in one.items()
    )
