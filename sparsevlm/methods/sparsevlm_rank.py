"""SparseVLM with rank-adaptive sparsification (section 3.2): the rank of the attention says how many tokens stay.

P is the raters x visual tokens attention of a pruning layer, averaged over heads. Three rules are in circulation:
- "paper" (eq. 7): *delete* N = lam * (L_v - rank(P)) tokens; where N = 0 the layer is skipped. lam is never published.
- "v1.0" (the authors' first code, b72c5d6): *keep* min(int(scale * rank(P) + bias), L_v - 1) tokens after layers 2, 6,
  15 and 19. Its README sets scale 13.5, bias 0 for "192" on MME; 9, 6 for "128" on POPE; 0.8, 0 for "64" on TextVQA.
- "video" (their Video-LLaVA branch, f05b898): *keep* rank(P) tokens after layer 1. As published that branch cannot run
  (its one call lacks an argument); this is what its parts compute.

In practice rank(P) is the number of raters (fewer rows than columns), so the length of the prompt, not the content of
the picture, decides: look at `trace`. There is no budget; the trace states the mean tokens reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevlm.budget import scale_layers
from sparsevlm.core.rank import attention_rank
from sparsevlm.core.scores import mean_scores
from sparsevlm.methods.base import one_of
from sparsevlm.methods.sparsevlm import SparseVLM
from sparsevlm.runtime.stage import Stage

RULES = ("paper", "v1.0", "video")
_LAYERS = {"paper": (2, 6, 15), "v1.0": (2, 6, 15, 19), "video": (1,)}  # of 32


@dataclass(frozen=True)
class SparseVLMRank(SparseVLM):
    """SparseVLM with an adaptive number of tokens. Further options as in `SparseVLM`, but for `keep`.

    Attributes:
        rule: "paper", "v1.0" or "video".
        lam: share of L_v - rank(P) that the paper's rule deletes.
        scale, bias: of the v1.0 rule.
    """

    rule: str = "paper"
    lam: float = 0.5
    scale: float = 13.5
    bias: float = 0.0

    name: ClassVar[str] = "sparsevlm_rank"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget not in (None, "full"):
            raise ValueError(
                f"sparsevlm_rank has no budget (got {self.budget}). Use lam, or scale and bias, and read the mean "
                "tokens reached from the trace; or use sparsevlm"
            )
        super().__post_init__()
        one_of(self.rule, RULES, "rule")
        if self.keep is not None:
            raise ValueError("sparsevlm_rank decides how many tokens to keep. Use sparsevlm for keep lists")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam {self.lam} is a share between 0 and 1")

    def where(self, n_layers: int) -> tuple[int, ...]:
        return scale_layers(n_layers, _LAYERS[self.rule]) if self.layers is None else tuple(self.layers)

    def score(self, stage: Stage) -> Tensor:
        weights = stage.prefill.weights
        assert weights is not None  # set in `begin`
        rows = stage.visual_columns(stage.attention(stage.prefill.tail))
        stage.prefill.scratch["ranks"] = attention_rank(rows.mean(1), weights > 0, stage.visual_valid)
        return mean_scores(rows, weights)

    def keep_counts(self, stage: Stage) -> list[int]:
        ranks = stage.prefill.scratch["ranks"]
        return [self._keep(n, r) if n else 0 for n, r in zip(stage.n_visual, ranks, strict=True)]

    def _keep(self, n: int, rank: int) -> int:
        """Return how many of `n` tokens to keep at a given rank; at least one."""
        if self.rule == "paper":
            return max(1, n - max(0, int(self.lam * (n - rank))))
        if rank == n:  # both of the authors' rules skip the layer then
            return n
        if self.rule == "video":
            return max(1, rank)
        most = n - 1 if n > 1 else n  # the code always drops one; published runs depend on it
        return max(1, min(int(rank * self.scale + self.bias), most))
