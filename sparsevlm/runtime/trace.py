"""What happened: one record per forward that brought visual tokens. Tensors are worked out when they are looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sparsevlm.budget import mean_entering, mean_leaving


@dataclass
class StageRecord:
    """One pruning point of one prefill. Lists have one entry per sample.

    Attributes:
        layer: 0-based layer on whose output pruning acted; -1 = before the language model.
        tokens_in: visual tokens that entered.
        tokens_out: visual tokens that were left, recycled ones included.
        recycled: merged tokens made here.
        positions: position ids of what was left: its own ("original") or counted anew ("renumber"). A model whose
            positions have several axes keeps them, whatever the method's option says.
    """

    layer: int
    tokens_in: list[int]
    tokens_out: list[int]
    recycled: list[int]
    _details: Callable[[], tuple[list, list, list]] | None = field(repr=False)
    positions: str = "original"

    @cached_property
    def _worked_out(self) -> tuple[list, list, list]:
        assert self._details is not None  # else it has been worked out
        return self._details()

    def __getstate__(self) -> dict:
        """Copies and pickles hold the worked-out tensors, not what they are worked out of."""
        return {**vars(self), "_worked_out": self._worked_out, "_details": None}

    @property
    def scores(self) -> list[Tensor | None]:
        """[tokens_in] float scores of the tokens that entered; None where nothing had to be scored."""
        return self._worked_out[0]

    @property
    def kept(self) -> list[Tensor]:
        """[n] int64, ascending: the kept tokens as positions among the visual tokens that entered."""
        return self._worked_out[1]

    @property
    def origin(self) -> list[Tensor]:
        """[n] int64: the same tokens as indices into the prompt's original visual tokens; -1 = a recycled token."""
        return self._worked_out[2]


@dataclass
class PrefillRecord:
    """One forward that brought visual tokens.

    Attributes:
        n_visual: visual tokens of each sample.
        n_tokens: tokens of each sample, text included, padding excluded.
        n_layers: layers of the language model.
        stages: pruning points in order.
        clamped: samples that have fewer visual tokens than the budget asks for: it counts as what they have.
    """

    n_visual: list[int]
    n_tokens: list[int]
    n_layers: int
    stages: list[StageRecord] = field(default_factory=list)
    _raters: Callable[[], list[Tensor]] | None = field(default=list, repr=False)
    clamped: list[bool] = field(default_factory=list)

    @cached_property
    def raters(self) -> list[Tensor]:
        """Per sample the positions of the rater tokens in the input, int64 (empty for methods without raters)."""
        assert self._raters is not None  # else they have been worked out
        return self._raters() or [torch.empty(0, dtype=torch.long) for _ in self.n_visual]

    @property
    def entering(self) -> list[float]:
        """Mean visual tokens entering a layer, per sample: what is computed."""
        return self._mean(mean_entering)

    @property
    def leaving(self) -> list[float]:
        """Mean visual tokens leaving a layer, per sample: the authors' count."""
        return self._mean(mean_leaving)

    def __getstate__(self) -> dict:
        """As for `StageRecord`."""
        return {**vars(self), "raters": self.raters, "_raters": None}

    def _mean(self, rule: Callable) -> list[float]:
        layers = [s.layer for s in self.stages]
        return [
            rule(n, layers, [s.tokens_out[b] for s in self.stages], self.n_layers) for b, n in enumerate(self.n_visual)
        ]


@dataclass
class Trace:
    """Records of all prefills since the method was installed, in order. They hold tensors: `clear()` in long runs."""

    prefills: list[PrefillRecord] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all records."""
        self.prefills.clear()
