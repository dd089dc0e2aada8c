"""SCOPE (arXiv 2510.24214, NeurIPS 2025): patches that CLS attends to and that cover the others.

1. a = CLS attention to the patches, of the layer that the language model reads, summed over heads; C = cosines of that
   layer's outputs.
2. Greedy: the token of highest a_i^alpha * sum_u max(0, C_ui - best_u) is chosen, where best_u is the cosine of u and
   the most similar chosen token, at first 0 (negative cosines never count); T times.
3. They go to the projector in their original order. Nothing but their number depends on T, so what is kept of a
   smaller budget is kept of a larger one.

Source: the authors' repository (kinredon/SCOPE, 6bf7306, scope/clip_encoder.py:SCOPE; no licence at its root, read and
not copied). `alpha` and `combine` are its environment variables ALPHA and COMBINED. Its other entry point
(LLaVA/llava_arch.py, BASELINE=SUBMODULE) is an older experiment.

Deviations: pictures of a prompt, and frames, share T without rounding down each one's share; a frame's own CLS token,
where the model takes it, is dropped first; half precision is computed in float32; ties go by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.core.coverage import facility_location
from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.methods._vision import VisionMethod, patches, selected
from sparsevlm.methods.base import one_of
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class SCOPE(VisionMethod):
    """Saliency and coverage.

    Attributes:
        alpha: exponent of the attention; 0 = coverage alone.
        combine: "multiply" the gain by the attention, or "add" it.
    """

    alpha: float = 1.0
    combine: str = "multiply"

    name: ClassVar[str] = "scope"
    captures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.combine, ("multiply", "add"), "combine")

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        saliency = pictures.cls_attention().sum(1)
        weight = saliency**self.alpha
        factors = {"weight": weight} if self.combine == "multiply" else {"modular": weight}
        chosen = facility_location(cosine_matrix(patches(pictures)), count, **factors)
        return selected(pictures, chosen, saliency)
