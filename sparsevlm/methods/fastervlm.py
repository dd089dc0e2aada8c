"""FasterVLM (arXiv 2412.01818v1): keep the patches that the vision tower's CLS token attends to most.

The attention is that of the layer whose output the language model reads (the last but one in LLaVA-1.5), averaged over
heads; the best T patches go to the projector in their original order. Source: the authors' repository FasterVLM
(Apache-2.0), as described in the paper; there is no hyper-parameter but T.

Deviations, none with an effect on what is kept: only the CLS row of the attention is computed, in float32, so the tower
keeps its attention backend; ties go by index. A video's budget is split over its frames as in the authors' branch
`video`; where the model also takes a frame's CLS token (Video-LLaVA on transformers), that one is dropped first, as the
authors' 8 x 256 tokens have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class FasterVLM(VisionMethod):
    """The top patches by CLS attention."""

    name: ClassVar[str] = "fastervlm"
    captures: ClassVar[bool] = True

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        scores = patch_scores(pictures)
        origin = rank_by_score(scores)[:, :count].sort(1).values
        return Reduced(take(pictures.features, origin), origin, scores)


def patch_scores(pictures: Pictures) -> Tensor:
    """Return the mean CLS attention [n, N] of the visual tokens; -inf for a CLS token among them."""
    scores = pictures.cls_attention().mean(1)
    return F.pad(scores, (1, 0), value=float("-inf")) if pictures.tower.cls else scores
