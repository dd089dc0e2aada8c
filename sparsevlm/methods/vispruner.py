"""VisPruner (arXiv 2412.01818, ICCV 2025): important patches by CLS attention, and diverse ones from the rest.

1. Important: the floor(T x ratio) patches that CLS attends to most, as in FasterVLM (mean over heads, the layer whose
   output the language model reads).
2. Diverse: of the other patches, sorted by that attention, duplicates are removed until T - floor(T x ratio) are left:
   deal them alternately into A and B, drop the 8 of A that are most similar (cosine of the layer's output) to any of B,
   repeat.
3. Both go to the projector in their original order.

Source: the paper and the authors' repository (Apache-2.0; ratio 0.5 by default, its README also shows 0.75 at 64).

Deviations: an odd number of candidates is dealt like any other (the authors' code fails, e.g. at T = 58); only the CLS
row of the attention is computed, in float32; similarities are computed once, not in every round; ties go by index; the
frames of a video share its budget, and a frame's own CLS token, where the model takes it, is dropped first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsevlm.core.diversity import cosine_matrix, remove_duplicates
from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.methods.fastervlm import patch_scores
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class VisPruner(VisionMethod):
    """CLS attention and duplicate removal.

    Attributes:
        ratio: share of the tokens that are chosen by importance; 1 = FasterVLM.
        step: duplicates dropped per round.
    """

    ratio: float = 0.5
    step: int = 8

    name: ClassVar[str] = "vispruner"
    captures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio {self.ratio} is a share between 0 and 1")
        if self.step < 1:
            raise ValueError(f"step {self.step} must be at least 1")

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        scores = patch_scores(pictures)
        order = rank_by_score(scores)[:, : pictures.tower.patches]
        important = int(count * self.ratio)
        diverse = remove_duplicates(
            cosine_matrix(pictures.features), order[:, important:], count - important, self.step
        )
        origin = torch.cat([order[:, :important], diverse], 1).sort(1).values
        return Reduced(take(pictures.features, origin), origin, scores)
