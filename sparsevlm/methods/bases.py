"""Bases that say where visual tokens go and how many stay, so that a method only has to score them.

| base | prunes | options beside `budget` |
| --- | --- | --- |
| `PruneAtInput` | at the language model's input | |
| `PruneOnce` | on the output of layer k - 1 | `k`, `keep`, `match`, `early_drop` |
| `PruneByLists` | on the output of several layers, to lists of token counts (`lists`) | `layers`, `keep` |
| `PruneByRatios` | on the output of several layers, to shares of the original tokens | `layers`, `ratios`, `match` |

A method with another rule derives from `PlannedMethod`; one that acts in the vision tower from `VisionMethod`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from sparsevlm.budget import (
    Schedule,
    check_layers,
    explicit_schedule,
    in_tokens,
    nearest,
    scale_layers,
    solve,
    start_earlier,
)
from sparsevlm.methods.base import Method, int_tuple, one_of

if TYPE_CHECKING:
    from sparsevlm.runtime.families import Family

MATCHES = ("leaving", "entering")
_FIRST_LAYER = 2  # of 32: the authors' K = 3 of FastV's comparison with SparseVLM
_PAPER_DEPTH = 32


@dataclass(frozen=True)
class PlannedMethod(Method):
    """Base of the methods that prune in the language model: turns a budget, or the option instead of it, into a plan.

    A subclass overrides `plan_budget`; also `plan_counts` if it has an option named in `instead`, and `where` if it has
    one or is adaptive.
    """

    instead: ClassVar[str] = ""  # name of the option that gives the token counts when there is no budget

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.instead and getattr(self, self.instead) is not None:
            raise ValueError(f"budget and {self.instead} exclude each other. Use one of them")
        if self.adaptive and self.budget not in (None, "full"):
            raise ValueError(
                f"{self.name} has no budget (got {self.budget}): it decides from the picture how many tokens stay. Use "
                "its own options and read the mean tokens reached from the trace"
            )

    def where(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers, 0-based, on whose output tokens go when no budget moves them; -1 is the input."""
        raise NotImplementedError

    def plan_counts(self, n_visual: int, n_layers: int) -> Schedule:
        """Return the schedule of the option named in `instead`."""
        raise NotImplementedError

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        """Return the schedule of a budget in tokens, 1 ... `n_visual`.

        Raises:
            ValueError: it is below what the layers can reach.
        """
        raise NotImplementedError

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        if self.adaptive and self.budget != "full":
            return _undecided(n_visual, n_layers, self.where(n_layers))
        if self.instead and getattr(self, self.instead) is not None:
            return self.plan_counts(n_visual, n_layers)
        if self.budget in (None, "full"):
            return super().plan(n_visual, n_layers)
        return self.plan_budget(in_tokens(self.budget, n_visual), n_visual, n_layers)


@dataclass(frozen=True)
class PruneAtInput(PlannedMethod):
    """Prunes once, at the language model's input: every layer computes `budget` visual tokens."""

    def where(self, n_layers: int) -> tuple[int, ...]:
        return (-1,)

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        return explicit_schedule(n_visual, n_layers, self.where(n_layers), (budget,))


@dataclass(frozen=True)
class PruneOnce(PlannedMethod):
    """Prunes once, on the output of layer k - 1, so that k layers see every visual token.

    Attributes:
        k: number of layers that see everything. None = 3 of 32 layers, scaled to the model's depth like SparseVLM's
            first pruning layer (32 layers: 3; 40: 4; 12: 2), and fewer where these layers alone would take up more than
            0.8 of the budget.
        keep: visual tokens kept, instead of a budget.
        match: which mean equals the budget: of the tokens that are "leaving" the layers (layer k - 1 counts with the
            kept ones, as in every budget here) or that are "entering" them, the cost.
        early_drop: layer k - 1 computes only the rows that outlive it; no effect where a method scores with layer k.
    """

    k: int | None = None
    keep: int | None = None
    match: str = "leaving"
    early_drop: bool = True

    instead: ClassVar[str] = "keep"
    matches: ClassVar[tuple[str, ...]] = MATCHES
    lowest_k: ClassVar[int] = 1  # 0 where tokens may go before any layer

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.match, self.matches, "match")
        for option in ("k", "keep"):
            value = int_tuple(getattr(self, option), option)
            least = self.lowest_k if option == "k" else 1
            if value is not None and (len(value) != 1 or value[0] < least):
                raise ValueError(f"{option} {getattr(self, option)!r} must be one whole number of at least {least}")
            self._set(option, value and value[0])

    def check(self, family: Family) -> None:
        if self.k is not None:
            check_layers((self.k - 1,), family.n_layers)

    def where(self, n_layers: int) -> tuple[int, ...]:
        return scale_layers(n_layers, (_FIRST_LAYER,)) if self.k is None else (self.k - 1,)

    def plan_counts(self, n_visual: int, n_layers: int) -> Schedule:
        return explicit_schedule(n_visual, n_layers, self.where(n_layers), (self.keep,))

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        return _once(budget, n_visual, n_layers, self.k, self.match)


@dataclass(frozen=True)
class PruneInStages(PlannedMethod):
    """Prunes on the output of several layers.

    Attributes:
        layers: 0-based layers on whose output pruning acts; None = 2, 6, 15 of 32, scaled to the model's depth.
    """

    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("layers", int_tuple(self.layers, "layers"))

    def check(self, family: Family) -> None:
        if self.layers is not None:
            check_layers(self.layers, family.n_layers)

    def where(self, n_layers: int) -> tuple[int, ...]:
        return scale_layers(n_layers) if self.layers is None else tuple(self.layers)


@dataclass(frozen=True)
class PruneByLists(PruneInStages):
    """Prunes in stages to a list of token counts; a budget is met with the shape of the published `lists`.

    Attributes:
        keep: visual tokens kept at each of `layers`, instead of a budget; recycled tokens come on top.
    """

    keep: Sequence[int] | None = None

    instead: ClassVar[str] = "keep"
    # published (budget, keep list) pairs at layers 2, 6, 15 of 32, ascending
    lists: ClassVar[tuple[tuple[int, tuple[int, ...]], ...]] = ()
    always_drop = False  # drop at least one token per stage (a method may make an option of it)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("keep", int_tuple(self.keep, "keep"))
        if self.budget not in (None, "full") and not self.lists:
            raise ValueError(f"{self.name} has no published lists that give a budget its shape. Use keep instead")
        if self.keep is not None and self.layers is not None and len(self.keep) != len(self.layers):
            raise ValueError(
                f"layers {self.layers} and keep {self.keep} differ in length. Use as many counts as layers"
            )

    def plan_counts(self, n_visual: int, n_layers: int) -> Schedule:
        layers = self.where(n_layers)
        return explicit_schedule(n_visual, n_layers, layers, self.keep, self.recycle, self.cluster, self.always_drop)

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        return solve(budget, n_visual, n_layers, self.lists, self.layers, self.recycle, self.cluster)


@dataclass(frozen=True)
class PruneByRatios(PruneInStages):
    """Prunes in stages to shares of the original tokens; a budget sets them to lambda, lambda^2, lambda^3, ...

    Attributes:
        layers: 0-based layers on whose output pruning acts; None = the first of `published` whose first layer leaves
            room for the budget.
        ratios: share of the original tokens left after each of them, instead of a budget.
        match: which mean equals the budget, "leaving" or "entering".
    """

    ratios: Sequence[float] | None = None
    match: str = "leaving"

    instead: ClassVar[str] = "ratios"
    # sets of layers, counted from 1 of 32, in order of preference
    published: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 7, 16),)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.match, MATCHES, "match")
        if self.ratios is None:
            return
        self._set("ratios", tuple(float(ratio) for ratio in self.ratios))
        if not all(0 < ratio <= 1 for ratio in self.ratios) or list(self.ratios) != sorted(self.ratios, reverse=True):
            raise ValueError(f"ratios {self.ratios} are shares of the original tokens, above 0, at most 1, not rising")
        if len(self.ratios) != len(self.published[0] if self.layers is None else self.layers):
            stages = (
                f"the {len(self.published[0])} published stages" if self.layers is None else f"layers {self.layers}"
            )
            raise ValueError(f"ratios {self.ratios} and {stages} differ in length. Use as many ratios as layers")

    def where(self, n_layers: int) -> tuple[int, ...]:
        return _scaled(self.published[0], n_layers) if self.layers is None else tuple(self.layers)

    def plan_counts(self, n_visual: int, n_layers: int) -> Schedule:
        assert self.ratios is not None  # else there is a budget
        return _shares(n_visual, n_layers, self.where(n_layers), self.ratios)

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        layers = self.layers
        if layers is None:
            layers = _with_room(self.published, budget, n_visual, n_layers, self.match)
        return _geometric(budget, n_visual, n_layers, layers, self.match)


def _undecided(n_visual: int, n_layers: int, layers: tuple[int, ...]) -> Schedule:
    """Return a schedule of which only the layers are known: the counts are those of an adaptive method."""
    check_layers(layers, n_layers)
    none = (0,) * len(layers)
    return Schedule(n_visual, n_layers, layers, (n_visual,) * len(layers), none, none)


@lru_cache(maxsize=4096)
def _once(budget: int, n_visual: int, n_layers: int, k: int | None, match: str) -> Schedule:
    """Return the schedule that prunes once, on the output of layer k - 1, so that the mean `match` is the budget.

    Raises:
        ValueError: the budget is out of reach of k.
    """
    counted = 1 if match == "leaving" else 0  # layer k - 1 counts with the kept tokens
    if k is None:
        untouched = start_earlier(scale_layers(n_layers, (_FIRST_LAYER,))[0] + 1 - counted, budget, n_visual, n_layers)
        k = max(untouched + counted, 1)
    full = max(k - counted, 0)
    rest = n_layers - full
    keep = int((budget * n_layers - full * n_visual) / rest + 0.5)
    if keep < 1:
        floor = (full * n_visual + rest) / n_layers
        raise ValueError(
            f"budget {budget} is out of reach of k={k} with match={match}: the layers that count with all {n_visual} "
            f"visual tokens alone make a mean of at least {floor:.1f}. Use a smaller k, or at least that budget"
        )
    return explicit_schedule(n_visual, n_layers, (k - 1,), (keep,))


def _shares(n_visual: int, n_layers: int, layers: tuple[int, ...], ratios: Sequence[float]) -> Schedule:
    """Return the schedule that keeps int(n_visual * ratio) tokens, at least one, at each of `layers`."""
    return explicit_schedule(n_visual, n_layers, layers, tuple(max(1, int(n_visual * ratio)) for ratio in ratios))


@lru_cache(maxsize=4096)
def _geometric(budget: int, n_visual: int, n_layers: int, layers: tuple[int, ...], match: str) -> Schedule:
    """Return the schedule of ratios lambda, lambda^2, ... whose mean `match` is nearest to the budget.

    Raises:
        ValueError: the layers do not fit the model, or the budget is out of their reach.
    """
    check_layers(layers, n_layers)

    def schedule(ratio: float) -> Schedule:
        return _shares(n_visual, n_layers, layers, [ratio ** (i + 1) for i in range(len(layers))])

    def mean(planned: Schedule) -> float:
        return planned.leaving if match == "leaving" else planned.entering

    floor = mean(schedule(0.0))
    if budget < floor:
        raise ValueError(
            f"budget {budget} is out of reach of pruning layers {layers} with match={match}: the layers that see all "
            f"{n_visual} visual tokens alone make a mean of at least {floor:.1f}. Use earlier layers"
        )
    return nearest(schedule, mean, budget)


def _with_room(
    published: tuple[tuple[int, ...], ...], budget: int, n_visual: int, n_layers: int, match: str
) -> tuple[int, ...]:
    """Return the first set of layers before whose first stage there is room (see `start_earlier`), else the last."""
    for layers in (_scaled(candidate, n_layers) for candidate in published[:-1]):
        full = layers[0] + (match == "entering")
        if start_earlier(full, budget, n_visual, n_layers) == full:
            return layers
    return _scaled(published[-1], n_layers)


def _scaled(published: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Return 0-based layers for another depth than 32; those that do not fit a shallow model are left out."""
    layers: list[int] = []
    for layer in published:
        new = max(int(layer * n_layers / _PAPER_DEPTH + 0.5) - 1, layers[-1] + 1 if layers else 0)
        if new <= n_layers - 2:
            layers.append(new)
    return tuple(layers)
