"""AnchorPrune (arXiv 2607.07033, ECCV 2026): protect what the question is about, then add what is salient and new.

1. Relevance of a patch: minus the cosine of its CLIP image embedding and the question's CLIP text embedding, as in
   CDPruner.
2. Anchor: the `k_min` most relevant patches, and further ones by relevance up to floor(0.5 T). Going down the ranks,
   patches are counted whose cosine distance, in CLIP's joint space, to all of the first `k_min` is above `tau`; the
   anchor ends with the third of them (it is part of the anchor). Nothing redundant is taken out of it.
3. Expansion: always the patch of highest CLS attention (of the layer that the language model reads, mean over heads)
   times cosine distance, on that layer's outputs, to the nearest chosen one, at most 1, until T are chosen. They go to
   the projector in their original order.

`k_min` is 5, 10, 20 in the authors' scripts for T = 32, 64, 128; the default is 5 T / 32, rounded.

Source: the authors' repository (MULTI-cau/AnchorPrune, 9aa2774, anchorprune/selection.py and llava.py; Apache-2.0).
Like `cdpruner` it needs the CLIP model of the vision tower (`clip=`), and reads the question from the prompt.

Deviations: relevance that is the same everywhere does not divide by 1e-12; ties go by index; pictures of a prompt, and
frames, share T and get an anchor each; the question is the prompt's text after its last picture, not the evaluator's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsevlm.core.coverage import farthest_first
from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.core.packing import pack, take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._clip import ClipMethod
from sparsevlm.methods._vision import patches, selected
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class AnchorPrune(ClipMethod):
    """Relevance anchor and salient novelty. `clip`, `tokenizer` and `question` as in `ClipMethod`.

    Attributes:
        k_min: least size of the anchor; None = 5 T / 32, rounded.
        tau: cosine distance above which a patch is new.
        patience: new patches at which the anchor ends.
        k_max: largest share of T that the anchor takes.
    """

    k_min: int | None = None
    tau: float = 0.2
    patience: int = 3
    k_max: float = 0.5

    name: ClassVar[str] = "anchorprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_min is not None and self.k_min < 1:
            raise ValueError(f"k_min {self.k_min} must be at least 1")
        if self.patience < 1 or not 0 <= self.k_max <= 1:
            raise ValueError(f"patience {self.patience} must be at least 1, k_max {self.k_max} a share from 0 to 1")

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        assert pictures.relevance is not None  # `encode` has computed it
        cls = int(pictures.tower.cls)
        relevance, embeds = pictures.relevance[:, cls:], pictures.more["embeds"][:, cls:]
        least = min(int(5 * count / 32 + 0.5) if self.k_min is None else self.k_min, count)
        ranked = rank_by_score(relevance)[:, : max(least, int(self.k_max * count), 1)]
        size = self.anchor_size(take(embeds, ranked), max(least, 1))
        inside = torch.arange(ranked.shape[1], device=size.device) < size
        anchor = torch.zeros_like(relevance, dtype=torch.bool).scatter(1, ranked, inside)
        attention, cosines = pictures.cls_attention().mean(1), cosine_matrix(patches(pictures))
        more = farthest_first(cosines, count - max(least, 1), attention, start=anchor)
        wanted = torch.arange(more.shape[1], device=size.device) < count - size
        chosen = anchor.scatter(1, more, wanted | anchor.gather(1, more))
        return selected(pictures, pack(chosen, count), relevance)

    def anchor_size(self, ranked: Tensor, least: int) -> Tensor:
        """Return how many [n, 1] of the most relevant patches, unit embeddings [n, K, d] by rank, are the anchor."""
        novelty = (1 - ranked[:, least:] @ ranked[:, :least].mT).amin(2)
        events = (novelty > self.tau).cumsum(1)
        return least + ((events < self.patience).sum(1, keepdim=True) + 1).clamp(max=ranked.shape[1] - least)
