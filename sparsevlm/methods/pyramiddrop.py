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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from sparsevlm.budget import Schedule, check_budget, check_layers, explicit_schedule, nearest, start_earlier
from sparsevlm.methods.base import Method, int_tuple, one_of
from sparsevlm.methods.fastv import MATCHES, last_token_scores, rate_by_last_token
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage

_PUBLISHED, _EARLY, _EARLIEST = (8, 16, 24), (2, 8, 16), (1, 8, 16)  # of 32, counted from 1


@dataclass(frozen=True)
class PyramidDrop(Method):
    """PyramidDrop.

    Attributes:
        layers: 0-based layers on whose output a stage acts (published: 7, 15, 23). None = as described above.
        ratios: share of the original tokens left after each of them, instead of a budget.
        match: which mean equals the budget, "leaving" or "entering".
        positions: "renumber" (the authors' code) or "original".
    """

    layers: Sequence[int] | None = None
    ratios: Sequence[float] | None = None
    match: str = "leaving"
    positions: str = "renumber"

    name: ClassVar[str] = "pyramiddrop"
    needs_text: ClassVar[bool] = True
    scores_next: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("layers", int_tuple(self.layers, "layers"))
        one_of(self.match, MATCHES, "match")
        one_of(self.positions, ("renumber", "original"), "positions")
        if self.ratios is None:
            return
        if self.budget is not None:
            raise ValueError("give either a budget or ratios, not both")
        self._set("ratios", tuple(float(r) for r in self.ratios))
        if not all(0 < r <= 1 for r in self.ratios) or list(self.ratios) != sorted(self.ratios, reverse=True):
            raise ValueError(f"ratios {self.ratios} are shares of the original tokens, above 0, at most 1, not rising")
        if len(self.ratios) != len(_PUBLISHED if self.layers is None else self.layers):
            stages = "the published 3 stages" if self.layers is None else f"layers {self.layers}"
            raise ValueError(f"ratios {self.ratios} and {stages} differ in length; give as many layers as ratios")

    def check(self, family: Family) -> None:
        if self.layers is not None:
            check_layers(self.layers, family.n_layers)

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        if self.ratios is not None:
            layers = _scaled(_PUBLISHED, n_layers) if self.layers is None else self.layers
            return _shares(n_visual, n_layers, layers, self.ratios)
        if self.budget in (None, "full"):
            return super().plan(n_visual, n_layers)
        return _solve(self.budget, n_visual, n_layers, self.layers, self.match)

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        rate_by_last_token(prefill, embeddings)

    def score(self, stage: Stage) -> Tensor:
        return last_token_scores(stage)


def _shares(n_visual: int, n_layers: int, layers: tuple[int, ...], ratios: Sequence[float]) -> Schedule:
    keep = tuple(max(1, int(n_visual * ratio)) for ratio in ratios)
    return explicit_schedule(n_visual, n_layers, layers, keep)


@lru_cache(maxsize=4096)
def _solve(budget: int, n_visual: int, n_layers: int, layers: tuple[int, ...] | None, match: str) -> Schedule:
    check_budget(budget, n_visual)
    if layers is None:
        layers = _choose(budget, n_visual, n_layers, match)
    check_layers(layers, n_layers)

    def schedule(lam: float) -> Schedule:
        return _shares(n_visual, n_layers, layers, [lam ** (i + 1) for i in range(len(layers))])

    def mean(s: Schedule) -> float:
        return s.leaving if match == "leaving" else s.entering

    floor = mean(schedule(0.0))
    if budget < floor:
        raise ValueError(
            f"budget {budget} is out of reach of PyramidDrop at layers {layers} with match={match}: the layers that "
            f"see all {n_visual} visual tokens alone make a mean of at least {floor:.1f}. Use earlier layers"
        )
    return nearest(schedule, mean, budget)


def _choose(budget: int, n_visual: int, n_layers: int, match: str) -> tuple[int, ...]:
    """The first of the three sets of layers before whose first stage there is room."""
    for published in (_PUBLISHED, _EARLY):
        layers = _scaled(published, n_layers)
        full = layers[0] + (match == "entering")
        if start_earlier(full, budget, n_visual, n_layers) == full:
            return layers
    return _scaled(_EARLIEST, n_layers)


def _scaled(published: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """0-based layers of a model of another depth than 32; those that do not fit a shallow model are left out."""
    layers: list[int] = []
    for layer in published:
        new = max(int(layer * n_layers / 32 + 0.5) - 1, layers[-1] + 1 if layers else 0)
        if new <= n_layers - 2:
            layers.append(new)
    return tuple(layers)
