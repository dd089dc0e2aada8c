"""Plain downsampling: a smaller picture, the control that many pruning methods lose to (VTC-Bench, arXiv 2510.07143).

With `of="picture"`, the definition of VTC-Bench, the picture is resized so that s x s patches remain, s =
floor(sqrt(T)), and the vision tower sees only these; its position table is interpolated (transformers'
interpolate_pos_encoding).
With `of="features"` the tower sees the whole picture, and its grid of features is resized to s x s by area averaging.

Only squares can be reached: a budget of 192, 128, 64 gives 169, 121, 64 tokens, and the trace says so. All pictures of
a prompt, and all frames of a video, get the same s = floor(sqrt(budget / pictures)).

Deviation: the resizing (bicubic, antialiased) starts from the pixels that the processor made, not from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import in_tokens
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.methods.base import one_of
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Tower, Vision, find_towers


@dataclass(frozen=True)
class Downsample(VisionMethod):
    """A coarser grid of visual tokens.

    Attributes:
        side: patches per side that remain, instead of a budget.
        of: what is resized: "picture" or "features".
    """

    side: int | None = None
    of: str = "picture"

    name: ClassVar[str] = "downsample"
    captures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.of, ("picture", "features"), "of")
        if self.side is not None and self.budget is not None:
            raise ValueError("budget and side exclude each other. Use one of them")

    @property
    def active(self) -> bool:
        return self.side is not None or super().active

    def check(self, family: Family) -> None:
        for tower in find_towers(family, self.name):
            if self.side is not None and not 1 <= self.side <= tower.grid:
                raise ValueError(f"side {self.side} must be between 1 and the tower's {tower.grid} patches per side")

    def spend(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        if self.side is not None:
            return [self.side**2] * len(sizes)
        budget = in_tokens(self.budget, sum(sizes))
        if budget == sum(sizes):
            return list(sizes)
        if budget < len(sizes):
            raise ValueError(f"budget {budget} leaves less than a token for each of {len(sizes)} pictures")
        return [isqrt(budget // len(sizes)) ** 2] * len(sizes)

    # ---- smaller pictures ------------------------------------------------------------------------------------------
    def tower_hooks(self, vision: Vision, tower: Tower) -> list[RemovableHandle]:
        if self.of == "features":
            return []
        before = partial(self._shrink, vision, tower)
        return [tower.module.register_forward_pre_hook(before, with_kwargs=True)]

    def _shrink(
        self, vision: Vision, tower: Tower, module: Network, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """Let the tower's call compute the last group of pictures; the others are computed here."""
        encoding = vision.encoding
        assert encoding is not None  # the tower is being called
        if not encoding.groups:
            return None
        pixels = args[0] if args else kwargs["pixel_values"]
        with part("pictures"):
            *others, last = [resized(pixels[group], tower, encoding.counts[group[0]]) for group in encoding.groups]
        states = vision.scratch["states"] = []
        for small in others:
            x = module.pre_layrnorm(module.embeddings(small, interpolate_pos_encoding=True))
            for layer in tower.blocks:
                x = layer(x, None)
            states.append(x)
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        return ((last, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": last})

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        if self.of == "features":
            return super().encode(vision, pictures, encoding)
        states, out = [*vision.scratch.pop("states"), pictures.states], []
        for x, group in zip(states, encoding.groups, strict=True):
            count = encoding.counts[group[0]]
            rows = x if count == x.shape[1] and encoding.tower.cls else x[:, 1:]
            out.append(Reduced(rows, _centres(encoding.tower, count, x)))
        return out

    # ---- smaller feature maps --------------------------------------------------------------------------------------
    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        tower, side = pictures.tower, isqrt(count)
        grid = pictures.features[:, int(tower.cls) :].unflatten(1, (tower.grid, tower.grid)).permute(0, 3, 1, 2)
        rows = F.interpolate(grid.float(), size=(side, side), mode="area").flatten(2).transpose(1, 2)
        return Reduced(rows.to(pictures.features.dtype), _centres(tower, count, rows))


def resized(pixels: Tensor, tower: Tower, count: int) -> Tensor:
    """Resize pictures to [n, 3, H, W] of which the tower makes `count` patches (and CLS)."""
    size = isqrt(count) * tower.module.config.patch_size
    if size == pixels.shape[-1]:
        return pixels
    small = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return small.to(pixels.dtype)


def _centres(tower: Tower, count: int, like: Tensor) -> Tensor:
    """Return the visual tokens [n, count] in whose patches the centres of the cells of the coarser grid lie."""
    if count == tower.tokens:
        origin = torch.arange(count)
    else:
        side = isqrt(count)
        at = ((torch.arange(side) + 0.5) * tower.grid / side).long()
        origin = (at[:, None] * tower.grid + at).flatten() + int(tower.cls)
    return origin.to(like.device).expand(like.shape[0], -1)
