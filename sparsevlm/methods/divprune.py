"""DivPrune (arXiv 2503.02175, CVPR 2025): keep the projected visual tokens that differ most from each other.

Distance = 1 - cosine of the projector's outputs. The first token is the one whose nearest neighbour is farthest; then
always the one farthest from all those chosen, until T are chosen; they keep their order. Source: the paper, algorithm
1; the authors' code (CC-BY-NC) was not used.

Deviations: several pictures of a prompt are pruned one by one, each with its share of the budget (the authors' code
knows one image per prompt); T is given, not a ratio (a budget below 1 is one); distances are float32. What a picture is
where the number of tokens depends on it: see `ProjectedMethod`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.core.diversity import cosine_matrix, max_min
from sparsevlm.core.packing import take
from sparsevlm.methods._projected import ProjectedMethod
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class DivPrune(ProjectedMethod):
    """Max-min diversity of projected tokens."""

    name: ClassVar[str] = "divprune"

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        origin = max_min(1 - cosine_matrix(pictures.features), count).sort(1).values
        return Reduced(take(pictures.features, origin), origin)
