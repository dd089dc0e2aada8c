"""The vision towers of a model, and which of their features it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsevlm.runtime.families import RECORDS, Family
from sparsevlm.runtime.network import Network

#: Attributes that hold towers, and what these read.
TOWERS = {"vision_tower": "image", "image_tower": "image", "video_tower": "video"}


@dataclass(frozen=True)
class Tower:
    """A CLIP tower and how the model reads it.

    Attributes:
        module: the tower.
        kind: "image" or "video"; a video's pictures are its frames.
        layer: encoder layer whose output the features are.
        grid: patches per side.
        cls: whether the features contain the CLS token, as the first one.
    """

    module: Network
    kind: str
    layer: int
    grid: int
    cls: bool

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Tokens of one picture in the prompt."""
        return self.patches + self.cls

    @property
    def blocks(self) -> Sequence[Network]:
        """Encoder layers up to the one whose output the features are."""
        return self.module.encoder.layers[: self.layer + 1]


def find_towers(family: Family, name: str) -> list[Tower]:
    """The vision towers of a model.

    Raises:
        ValueError: the model has none, or not one that `name` can act in; says why.
    """
    config, record = getattr(family.outer, "config", None), family.record
    if record is None or not record.grid:
        why = "has no vision tower" if record is None else "lays out the projector's rows anew"
        grids = ", ".join(r.title for r in RECORDS.values() if r.grid)
        raise ValueError(
            f"method {name!r} acts in the vision tower or the projector and needs one row per patch; this "
            f"{config.model_type!r} model {why}. Use {grids}, or a method that acts in the language model"
        )
    found = [(kind, getattr(family.outer, attribute)) for attribute, kind in record.towers.items()]
    at, strategy = feature_choice(config)
    if not isinstance(at, int):
        raise ValueError(f"method {name!r} needs features of one layer; vision_feature_layer is {at}")
    towers = []
    for kind, module in found:
        if module.config.model_type != "clip_vision_model":
            raise ValueError(f"method {name!r} needs a CLIP vision tower, not {module.config.model_type!r}")
        depth = module.config.num_hidden_layers
        layer = at - 1 if at >= 0 else depth + at
        if not 0 <= layer < depth:
            raise ValueError(f"method {name!r}: vision_feature_layer {at} is no output of the tower's {depth} layers")
        cls = kind == "video" or strategy != "default"
        towers.append(Tower(module, kind, layer, module.config.image_size // module.config.patch_size, cls))
    return towers


def feature_choice(config, arguments: dict | None = None) -> tuple[Any, str]:
    """vision_feature_layer and vision_feature_select_strategy of a call with these arguments."""
    default = config.vision_feature_layer, getattr(config, "vision_feature_select_strategy", "default")
    asked = [(arguments or {}).get(n) for n in ("vision_feature_layer", "vision_feature_select_strategy")]
    return tuple(d if a is None else a for a, d in zip(asked, default, strict=True))
