"""HoloV (NeurIPS 2025, "Don't Just Chase Highlighted Tokens"): a quota of patches for each crop of the picture.

1. The patches are cut into 16 crops of consecutive indices: of 576 patches 36 each, one and a half rows (the paper
   shows squares).
2. A crop's weight is its mean CLS attention (of the layer that the language model reads, mean over heads). Its quota is
   floor(weight * T), and the rest goes to the crops of highest weight. A quota above the size of its crop is cut, and
   what is free goes to the crops with room, one each, by weight, as often as needed.
3. Of each crop the patches of highest attention stay. They come crop by crop, within a crop by falling attention, or
   in their order where all of it stays.

In the authors' code a token's score is 1000 times its attention plus 0.09 times the variance of its similarities to its
crop. But that variance is rescaled to the mean of the crop's attention before the mean over the crop is taken, so the
crop's score is 1.09 times the mean attention and the features have no say; they are left out here.

Source: the authors' repository (obananas/HoloV, 1d2e65e; Apache-2.0), whose quotas are not cut: too large ones leave
zero rows. Redistribution is that of RESTORE (cvlab-yonsei/RESTORE, 9b27e68, tore/holov/utils.py).

Deviations: zero rows are not handed on; weights are computed in at least float32; ties go by index; pictures of a
prompt, and frames, share T, and a frame's own CLS token, where the model takes it, is dropped first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.vision import Pictures, Reduced

_SCALE, _ALPHA, _EPSILON = 1000.0, 0.09, 1e-6


@dataclass(frozen=True)
class HoloV(VisionMethod):
    """CLS attention with a quota per crop.

    Attributes:
        crops: number of crops.
    """

    crops: int = 16

    name: ClassVar[str] = "holov"
    captures: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 1:
            raise ValueError(f"crops {self.crops} must be at least 1")

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        attention, cls = pictures.cls_attention().mean(1), int(pictures.tower.cls)
        origin = choose(attention, count, self.crops) + cls
        scores = F.pad(attention, (1, 0), value=float("-inf")) if cls else attention
        return Reduced(take(pictures.features, origin), origin, scores)


def choose(attention: Tensor, count: int, crops: int, redistribute: bool = True) -> Tensor:
    """Choose patches by their attention [n, P] with a quota per crop.

    Args:
        count: patches to choose.
        crops: number of crops; earlier ones get one patch more where it does not divide P.
        redistribute: give what is above a crop's size to others.

    Returns:
        [n, count] int64 in the order in which they are handed on; -1 at the end where a crop was too small.
    """
    total = int(attention.shape[1])  # a tracer makes tensors of sizes
    crops = min(crops, total)
    sizes = [total // crops + (i < total % crops) for i in range(crops)]
    first = [sum(sizes[:i]) for i in range(crops)]
    quota, weight = quotas(attention, sizes, first, count)
    if redistribute:
        quota = level(quota, weight, sizes, count)
    keys = []
    for i, (start, width) in enumerate(zip(first, sizes, strict=True)):
        ranks = rank_by_score(attention[:, start : start + width]).argsort(1)
        own, all_of_it = quota[:, i, None], torch.arange(width, device=attention.device)
        place = torch.where(own >= width, all_of_it, ranks) + start
        keys.append(place.masked_fill(ranks >= own, total))
    order = torch.cat(keys, 1).sort(dim=1, stable=True)
    chosen = order.indices[:, :count]
    return chosen.masked_fill(order.values[:, :count] == total, -1)


def quotas(attention: Tensor, sizes: list[int], first: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Return how many patches each crop gets [n, crops] int64, whatever its size, and the crops' weights."""
    means = [attention[:, start : start + size].mean(1) for start, size in zip(first, sizes, strict=True)]
    # a crop of one patch has no variance: the authors' code scores it by its bare attention
    factor = [_SCALE * (1 + _ALPHA) if size > 1 else 1.0 for size in sizes]
    score = torch.stack([mean * f for mean, f in zip(means, factor, strict=True)], 1)
    weight = score / (score.sum(1, keepdim=True) + _EPSILON)
    quota = (weight * count).floor().long()
    rest = count - quota.sum(1, keepdim=True)
    return quota + (rank_by_score(weight).argsort(1) < rest), weight


def level(quota: Tensor, weight: Tensor, sizes: list[int], count: int) -> Tensor:
    """Cut quotas [n, crops] at the crops' sizes and give the rest to those with room, round by round.

    Each round gives one to every crop with room; the last one to those of highest weight.
    """
    size = torch.tensor(sizes, device=quota.device)
    rounds = torch.arange(max(sizes) + 1, device=quota.device)
    filled = (quota[:, None] + rounds[:, None]).minimum(size)  # [n, rounds, crops]
    last = (filled.sum(2) <= count).sum(1, keepdim=True) - 1  # round that can be given to all
    quota = take(filled, last)[:, 0]
    rest = count - quota.sum(1, keepdim=True)
    room = quota < size
    order = rank_by_score(weight, room).argsort(1)
    return quota + ((order < rest) & room)
