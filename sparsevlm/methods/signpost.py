"""Signpost: cover the picture, above all where the question's words point. A method of this project, without a paper.

1. Words point (at the input). A word's distribution over places = softmax over the visual tokens of its cosine to them
   / 0.05, in the language model's input space. Its weight = the divergence of that from the uniform distribution: a
   colon resembles every place alike and has next to none. R = the weighted mean, scaled to a mean of 1.
2. Cover (at the input). A visual token must be covered with the weight u = 1 + 0.5 R + R blurred over its neighbours in
   the picture: what the question names counts, and so does what is beside it. Greedy facility location chooses the
   tokens: always the one that raises sum_v u_v max(0, max_chosen cos(v, chosen)) most. 1.5 times the budget stays.
3. Read (after half of the layers). Relevance = attention of all words after the picture, averaged over heads. Chosen
   greedily by relevance + coverage + 0.5 diversity, each over its mean (as TOPS, arXiv 2606.27161, sums them).

It needs no training, no vision tower, no attention of the tower, and no L x L map; it works on whatever visual tokens
enter the language model, pictures of a prompt and frames of a video together. Position ids are renumbered at the input
and stay what they are afterwards. The settings were found on development seeds of the embedded model's task alone:
docs/signpost.md. Where the pictures' grid is not known (a text model with `visual_mask`, towers of different sizes), R
is not blurred.

The budget is the mean over the layers as they are left. Multiply-adds of its own: one cosine matrix over the visual
tokens at the input (what DivPrune needs, too), the words' cosines, and the same of the 1.5 T tokens after half of the
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.budget import Schedule, check_budget, check_layers, explicit_schedule
from sparsevlm.core.coverage import balanced, facility_location
from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.core.pointing import distributions, information, neighbourhood, pointed_at
from sparsevlm.core.scores import mean_scores
from sparsevlm.methods.base import int_tuple, one_of
from sparsevlm.methods.bases import PlannedMethod
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.towers import Tower, find_towers

WEIGHTS = ("information", "equal", "none")


@dataclass(frozen=True)
class Signpost(PlannedMethod):
    """Coverage of what the question's words point at, then of what they attend to.

    Attributes:
        keep: tokens kept at the input and after `layer`, instead of a budget.
        first: tokens kept at the input over the budget; 1 = everything goes at the input.
        layer: 0-based layer on whose output the second stage acts; None = the last one of the first half.
        weights: what a word counts: "information", "equal", or "none" = no word points (plain coverage).
        temperature: of the words' distributions.
        named: weight of what words point at.
        near: weight of what lies around it.
        radius: how far that reaches, as a share of a picture's side.
        coverage, diversity: of the second stage.
        early_drop: the layer of the second stage computes only the rows that outlive it.
    """

    keep: Sequence[int] | None = None
    first: float = 1.5
    layer: int | None = None
    weights: str = "information"
    temperature: float = 0.05
    named: float = 0.5
    near: float = 1.0
    radius: float = 0.125
    coverage: float = 1.0
    diversity: float = 0.5
    early_drop: bool = True

    name: ClassVar[str] = "signpost"
    instead: ClassVar[str] = "keep"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("keep", int_tuple(self.keep, "keep"))
        one_of(self.weights, WEIGHTS, "weights")
        if self.keep is not None and len(self.keep) != 2:
            raise ValueError(f"keep {self.keep} must be two counts: tokens kept at the input, and after the layer")
        if self.first < 1:
            raise ValueError(f"first {self.first} must be at least 1: the later layers cannot have more tokens")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be positive")
        if min(self.named, self.near, self.radius, self.coverage, self.diversity) < 0:
            raise ValueError("named, near, radius, coverage and diversity must not be negative")

    # ---- budgets ---------------------------------------------------------------------------------------------------
    def check(self, family: Family) -> None:
        check_layers(self.where(family.n_layers), family.n_layers)

    def where(self, n_layers: int) -> tuple[int, ...]:
        return -1, max(n_layers // 2 - 1, 0) if self.layer is None else self.layer

    def plan_counts(self, n_visual: int, n_layers: int) -> Schedule:
        return explicit_schedule(n_visual, n_layers, self.where(n_layers), self.keep)

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        check_budget(budget, n_visual)
        return _schedule(budget, n_visual, n_layers, self.where(n_layers), self.first)

    # ---- selection -------------------------------------------------------------------------------------------------
    def attach(self, family: Family) -> Tower | None:
        """Return the tower whose grid all pictures have; None = it is not known."""
        try:
            towers = find_towers(family, self.name)
        except ValueError:
            return None
        return towers[0] if len({(tower.grid, tower.cls) for tower in towers}) == 1 else None

    def positions_after(self, layer: int) -> str:
        return "renumber" if layer < 0 else "original"

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        if not prefill.points:
            return
        valid = prefill.text_valid
        shape = prefill.batch, prefill.tail
        prefill.set_raters(torch.ones(shape, dtype=torch.bool, device=embeddings.device) if valid is None else valid)

    def score(self, stage: Stage) -> Tensor:
        """Score tokens by when they were chosen: 1, 1/2, 1/3, ...; those that were not have 0."""
        tokens, valid, keep = stage.visual(), stage.visual_valid, self.keep_counts(stage)
        count = max(keep)
        if stage.layer < 0:
            weights = self.to_cover(stage, tokens)
            similarity = cosine_matrix(tokens) * weights[..., None]
            chosen = facility_location(similarity, count, valid=valid)
        else:
            assert stage.prefill.weights is not None  # set in `begin`
            rows = stage.attention(stage.prefill.tail)
            relevance = stage.visual_columns(mean_scores(rows, stage.prefill.weights))
            chosen = balanced(relevance, cosine_matrix(tokens), count, self.coverage, self.diversity, valid)
        return _by_turn(chosen, keep, tokens.shape[1])

    def to_cover(self, stage: Stage, tokens: Tensor) -> Tensor:
        """Compute u [B, V]: how much it matters that a visual token is covered; 0 where there is none."""
        prefill, valid = stage.prefill, stage.visual_valid
        places = distributions(stage.hidden[:, -prefill.tail :], tokens, self.temperature, valid)
        u = places.new_ones(tokens.shape[:2])
        if self.weights != "none":
            assert prefill.weights is not None  # set in `begin`
            words = prefill.weights.to(places.dtype)
            if self.weights == "information":
                words = words * information(places, valid)
            pointed = pointed_at(places, words, valid)
            u = u + self.named * pointed + self.near * self._around(pointed, prefill.attached)
        return u if valid is None else u * valid

    def _around(self, pointed: Tensor, tower: Tower | None) -> Tensor:
        """Blur [B, V] over the pictures' grids."""
        if tower is None:
            return pointed
        size = -(-pointed.shape[1] // tower.tokens) * tower.tokens
        filled = F.pad(pointed, (0, size - pointed.shape[1]))
        radius = int(self.radius * tower.grid + 0.5)
        return neighbourhood(filled, tower.tokens, tower.grid, tower.cls, radius)[:, : pointed.shape[1]]


def _by_turn(chosen: Tensor, keep: Sequence[int], n_tokens: int) -> Tensor:
    """Return scores [B, n_tokens] of the first `keep` of `chosen` [B, count] in each sample: 1, 1/2, 1/3, ..."""
    turn = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    own = turn <= torch.tensor(keep, device=chosen.device)[:, None]
    return torch.zeros(chosen.shape[0], n_tokens, device=chosen.device).scatter(1, chosen, own / turn)


@lru_cache(maxsize=4096)
def _schedule(budget: int, n_visual: int, n_layers: int, layers: tuple[int, ...], first: float) -> Schedule:
    """Return the schedule that keeps budget * first tokens at the input and then what leaves a mean of the budget.

    What does not divide is left out, unless that is more than half a token of the mean.
    """
    check_layers(layers, n_layers)
    before = max(layers[1], 0)
    most = (budget * n_layers - (n_layers - before)) // max(before, 1)  # leaves one token after it
    early = min(n_visual, int(budget * first + 0.5), max(most, budget))
    rest = budget * n_layers - early * before
    late, left = divmod(rest, n_layers - before)
    late = min(late + (left > n_layers / 2), early)
    return explicit_schedule(n_visual, n_layers, layers, (early, max(late, 1)))
