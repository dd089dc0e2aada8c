"""PyramidDrop: fewer visual tokens stage by stage (Xing et al., CVPR 2025, https://arxiv.org/abs/2410.17247).

1. After layers 8, 16 and 24 of 32 (counted from 1) a part of the visual tokens is dropped.
2. Score of a visual token = the attention that the last token of the instruction pays it, averaged over the heads. It
   is that of the *next* layer: its input norm, queries and keys on the stage's output, softmax over all keys
   (authors' modeling_llama_pdrop.py:1291-1415).
3. int(n * ratio) of the n original tokens stay after a stage, in their order; the published ratios are 1/2, 1/4, 1/8.
   Position ids are renumbered to 0 ... length - 1, also those of generated tokens in the later layers.

A budget sets the ratios to lambda, lambda^2, lambda^3, as the authors advise (issue 29 of their repository), where
lambda meets the mean. Which layers: the published 8, 16, 24 where the seven before the first of them, which see
everything, leave room (their floor is 126.8 of 576 tokens leaving the layers, 144.7 entering them: 128 is at their edge
and 64 out of reach); else the authors' 2, 8, 16 of the same place (floor 18.97); else 1, 8, 16. "No room" is more than
0.8 of the budget, the rule of all methods here. With `layers` given nothing is moved and an unreachable budget is
refused. For a model of another depth a layer l (counted from 1) of 32 becomes floor(l * depth / 32 + 1/2).
`match="entering"` equates the mean of what enters the layers instead: with 2, 8, 16 it gives the authors' lambda for
64, 0.19, and the multiply-adds of the PDrop row of SparseVLM's Table 1.

Deviations from the authors' code: a prompt without text after the image stays whole; at least one token is kept;
attention is float32 in half precision, equal scores go by index; several images of a prompt are ranked together; in a
second turn, which their code does not have, scores use the position ids of the stage's layer, not of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevlm.methods.base import one_of
from sparsevlm.methods.bases import PruneByRatios
from sparsevlm.methods.fastv import last_token_scores, rate_by_last_token
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage


@dataclass(frozen=True)
class PyramidDrop(PruneByRatios):
    """PyramidDrop. `layers` (published: 7, 15, 23), `ratios` and `match` as in `PruneByRatios`.

    Attributes:
        positions: "renumber" (the authors' code) or "original".
    """

    positions: str = "renumber"

    name: ClassVar[str] = "pyramiddrop"
    needs_text: ClassVar[bool] = True
    scores_next: ClassVar[bool] = True
    published: ClassVar[tuple[tuple[int, ...], ...]] = ((8, 16, 24), (2, 8, 16), (1, 8, 16))  # of 32, counted from 1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.positions, ("renumber", "original"), "positions")

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        rate_by_last_token(prefill, embeddings)

    def score(self, stage: Stage) -> Tensor:
        return last_token_scores(stage)
