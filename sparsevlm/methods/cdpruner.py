"""CDPruner (arXiv 2506.10967, NeurIPS 2025): tokens that differ from each other and concern the question.

1. Relevance of a patch: minus the cosine of its CLIP image embedding (post-norm and visual projection of the layer that
   the language model reads) and the CLIP text embedding of the question, averaged over segments of 77 tokens; min-max
   normalised over the picture. (Minus: patches of CLIP resemble the texts that they do not show.) As in the authors'
   code only the first segment of a question of more than 75 tokens has a start token, only the last one an end; what
   CLIP takes for the embedding of the others is the state at the highest id, or at the first place.
2. Kernel: diag(relevance) C diag(relevance), C = cosines of the projected tokens.
3. T tokens by greedy MAP inference of the determinantal point process with that kernel, in their order.

Source: the paper and the authors' repository (Apache-2.0). LLaVA models contain CLIP's vision tower only, so the CLIP
model of the same tower has to be given (`clip=`, for LLaVA-1.5 openai/clip-vit-large-patch14-336); without it the
method refuses. Deviations: relevance is normalised per picture, not over the batch, and averaged over the segments of
the picture's own question; pictures of a prompt share the budget and are pruned one by one; the question is the
prompt's text after its last picture, without the final "ASSISTANT:" (the authors hand it over separately; `question=`
does that here). Reading it waits for the device. Kernel and relevance are computed in at least float32, and a gain of
the greedy inference that rounding makes negative counts as none (theirs becomes NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.core.diversity import cosine_matrix, dpp_greedy
from sparsevlm.core.packing import take
from sparsevlm.methods._clip import ClipMethod
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class CDPruner(ClipMethod):
    """Conditional diversity by a determinantal point process. `clip`, `tokenizer` and `question` as in `ClipMethod`."""

    name: ClassVar[str] = "cdpruner"
    after_projector: ClassVar[bool] = True

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        weight = pictures.relevance
        assert weight is not None  # `encode` has computed it
        kernel = weight[:, :, None] * cosine_matrix(pictures.features) * weight[:, None]
        origin = dpp_greedy(kernel, count).sort(1).values
        return Reduced(take(pictures.features, origin), origin, weight)
