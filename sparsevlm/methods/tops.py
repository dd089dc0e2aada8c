"""TOPS (arXiv 2606.27161): relevance, coverage and diversity together. From the paper, no authors' code.

Every stage is greedy: the most relevant token first, then always the highest
r_i / mean(r) + alpha * d_i / mean(d) + lam * c_i / mean(c), where d_i = 1 - the highest cosine to a chosen token, c_i =
what i adds to the coverage of the tokens that are not chosen, sum_j max(0, cos_ij - the highest cosine of j to a chosen
token), and means are over the tokens that are not chosen (algorithms 1 and 2).

1. Before the language model, all -> 2 T: cosines of the projector's outputs, r = CLS attention (of the layer that the
   language model reads, mean over heads), alpha = lam = 0.5.
2. At layers 12 and 24 of 32, -> T and -> T / 4: cosines of the states that enter the layer, r = the attention that text
   tokens pay in it, mean over heads; alpha = 0.5, lam = 0.5 for T of 128 and more, else 1. Positions are renumbered.

`tokens` is the paper's T; what enters the layers is then 1.19 T on average. A budget is the mean that leaves the
layers, as for every method here: 128, 64 and 32 make T = 113, 57 and 28.

What the paper leaves open, and what is done here: the text divides by the range (min-max) instead of the mean, its
algorithms by the mean, as here; the threshold by which text tokens are chosen is not given, so all of them after the
last picture rate (the paper has them within 0.1 point); the attention is that of the layer that gets fewer tokens, as
in PyramidDrop; where no lam is given for T, 0.5 from T = 96 on. Where it has no case: layers scale with the model's
depth; the first stage keeps at most all tokens; several pictures of a prompt share 2 T and are ranked together later; a
prompt without text after its last picture skips point 2; a frame's own CLS token, where the model takes it, is dropped
first; ties go by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sparsevlm.budget import Schedule, check_budget, check_layers, in_tokens, nearest
from sparsevlm.core.coverage import balanced
from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.core.scores import mean_scores
from sparsevlm.methods._vision import VisionMethod, patches, selected
from sparsevlm.methods.base import int_tuple
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.rows import column
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.vision import Pictures, Reduced, share

_LAYERS, _DEPTH, _MUCH = (12, 24), 32, 96


@dataclass(frozen=True)
class TOPS(VisionMethod):
    """Relevance, coverage and diversity in three stages.

    Attributes:
        tokens: the paper's T, instead of a budget.
        layers: two 0-based layers that see T and T / 4 tokens first; None = 12 and 24 of 32, scaled.
        alpha: weight of diversity.
        lam: weight of coverage inside the language model; None = 0.5 for T of at least 96, else 1. Before it 0.5.
    """

    tokens: int | None = None
    layers: Sequence[int] | None = None
    alpha: float = 0.5
    lam: float | None = None

    name: ClassVar[str] = "tops"
    captures: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    scores_next: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("layers", int_tuple(self.layers, "layers"))
        if self.tokens is not None and self.budget is not None:
            raise ValueError("budget and tokens exclude each other. Use one of them")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens {self.tokens} must be at least 1")
        if self.layers is not None and len(self.layers) != 2:
            raise ValueError(f"layers {self.layers} must be two")
        if min(self.alpha, self.lam or 0.0) < 0:
            raise ValueError(f"alpha {self.alpha} and lam {self.lam} must not be negative")

    @property
    def active(self) -> bool:
        return self.tokens is not None or super().active

    def check(self, family: Family) -> None:
        super().check(family)
        self._layers(family.n_layers)

    # ---- budgets ---------------------------------------------------------------------------------------------------
    def _layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers on whose output tokens go."""
        given = [int(i * n_layers / _DEPTH + 0.5) for i in _LAYERS] if self.layers is None else self.layers
        layers = tuple(layer - 1 for layer in given)
        check_layers(layers, n_layers)
        return layers

    def _stages(self, n_visual: int, n_layers: int) -> Schedule:
        layers = self._layers(n_layers)
        if self.tokens is not None:
            check_budget(self.tokens, n_visual)
            return _schedule(self.tokens, n_visual, n_layers, layers)
        return _solve(in_tokens(self.budget, n_visual), n_visual, n_layers, layers)

    def spend(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        if self.budget == sum(sizes):
            return list(sizes)
        return share(self._stages(sum(sizes), n_layers).keep[0], sizes)

    def plan_pictures(self, n_visual: int, n_layers: int, size: int) -> Schedule:
        if not self.active or self.budget == n_visual:
            return Schedule(n_visual, n_layers, (), (), (), ())
        return self._stages(n_visual, n_layers)

    # ---- choice ----------------------------------------------------------------------------------------------------
    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        relevance = pictures.cls_attention().mean(1)
        chosen = balanced(relevance, cosine_matrix(patches(pictures)), count, 0.5, self.alpha)
        return selected(pictures, chosen, relevance)

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        super().begin(prefill, embeddings)
        if prefill.tail:
            text = prefill.text_valid
            everything = torch.ones(prefill.batch, prefill.tail, dtype=torch.bool, device=prefill.device)
            prefill.set_raters(everything if text is None else text)

    def keep_counts(self, stage: Stage) -> list[int]:
        keep, asked = super().keep_counts(stage), stage.prefill.prompt.text.any(1)
        return [k if stage.layer < 0 or a else n for k, a, n in zip(keep, asked, stage.n_visual, strict=True)]

    def score(self, stage: Stage) -> Tensor:
        """Score a stage inside the language model by the order of choice: 1, 1/2, 1/3, ..., 0 for those not chosen."""
        if stage.layer < 0:
            return super().score(stage)
        tail, keep = stage.prefill.tail, self.keep_counts(stage)
        relevance = stage.visual_columns(mean_scores(stage.attention(tail), stage.prefill.weights))
        lam = [self._coverage(k, stage) for k in keep]
        lam = torch.tensor(lam, dtype=relevance.dtype, device=relevance.device)[:, None]
        cosines = cosine_matrix(stage.visual())
        count = min(max(keep), cosines.shape[1])
        order = balanced(relevance, cosines, count, lam, self.alpha, stage.visual_valid)
        place = torch.arange(1, count + 1, device=relevance.device)
        scores = torch.where(place <= column(keep, place.device), 1 / place.to(relevance.dtype), 0)
        return torch.zeros_like(relevance).scatter(1, order, scores)

    def _coverage(self, keep: int, stage: Stage) -> float:
        """Return lam of a sample that keeps `keep` tokens at a stage."""
        last = stage.layer == stage.prefill.points[-1]
        return self.lam if self.lam is not None else 0.5 if keep * (4 if last else 1) >= _MUCH else 1.0


def _schedule(tokens: float, n_visual: int, n_layers: int, layers: tuple[int, ...]) -> Schedule:
    """Return the stages of the paper's T: 2 T before the language model, T and T / 4 inside it."""
    first = max(1, min(int(2 * tokens + 0.5), n_visual))
    second = max(1, min(int(tokens + 0.5), first))
    keep = (first, second, max(1, min(int(tokens / 4 + 0.5), second)))
    return Schedule(n_visual, n_layers, (-1, *layers), keep, (0,) * 3, (0,) * 3)


@lru_cache(maxsize=4096)
def _solve(budget: int, n_visual: int, n_layers: int, layers: tuple[int, ...]) -> Schedule:
    """Return the stages whose mean that leaves the layers is nearest to the budget."""
    return nearest(lambda part: _schedule(part * 4 * n_visual, n_visual, n_layers, layers), lambda s: s.leaving, budget)
