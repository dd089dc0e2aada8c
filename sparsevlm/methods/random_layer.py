"""Random visual tokens at the layers where another method prunes: the control that shows what its choice is worth.

`match="leaving"` or `"entering"`: the layer, budgets and positions are FastV's (see `fastv`). `match="sparsevlm"`: the
layers, numbers of tokens, recycling and positions are SparseVLM's (see `sparsevlm`), so that nothing but the choice of
tokens differs: as many tokens enter and leave each layer, and the language model computes as much. The draw is that of
`random`; at the second and third stage it keeps the best drawn of what is left. It has no publication of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from sparsevlm.budget import Schedule
from sparsevlm.methods.base import Method, int_tuple
from sparsevlm.methods.bases import MATCHES, PruneOnce
from sparsevlm.methods.random import UniformDraw
from sparsevlm.methods.sparsevlm import SparseVLM
from sparsevlm.runtime.families import Family

LIKE_SPARSEVLM = "sparsevlm"


@dataclass(frozen=True)
class RandomLayer(UniformDraw, PruneOnce):
    """Keeps uniformly drawn visual tokens. Further options as in `PruneOnce`.

    Attributes:
        match: "leaving" or "entering" as in `PruneOnce`, or "sparsevlm": all counts are those of SparseVLM.
        keep: visual tokens kept, instead of a budget; with match="sparsevlm" a list, one number per layer.
        layers: with match="sparsevlm", as in `SparseVLM`: None = 2, 6, 15 of 32, scaled to the model's depth.
        seed: of the draw.
    """

    keep: Sequence[int] | int | None = None  # type: ignore[assignment]  # a list, with match="sparsevlm"
    layers: Sequence[int] | None = None
    seed: int = 0

    name: ClassVar[str] = "random_layer"
    matches: ClassVar[tuple[str, ...]] = (*MATCHES, LIKE_SPARSEVLM)

    def __post_init__(self) -> None:
        if self.match != LIKE_SPARSEVLM:
            if self.layers is not None:
                raise ValueError("layers are for match='sparsevlm'. Use k, the number of layers that see everything")
            super().__post_init__()
        elif self.k is not None:
            raise ValueError("k does not go with match='sparsevlm'. Use layers")
        else:
            Method.__post_init__(self)
        like = self._like  # made now, because using a method must not change it
        if like is not None:
            self._set("layers", like.layers)
            self._set("keep", like.keep)

    @cached_property
    def _like(self) -> SparseVLM | None:
        """The method whose counts these are; None if it has its own."""
        if self.match != LIKE_SPARSEVLM:
            return None
        return SparseVLM(budget=self.budget, layers=self.layers, keep=int_tuple(self.keep, "keep"))

    @property
    def needs_text(self) -> bool:  # type: ignore[override]  # here it depends on the options
        return self._like is not None

    @property
    def positions(self) -> str:  # type: ignore[override]
        return PruneOnce.positions if self._like is None else self._like.positions

    def check(self, family: Family) -> None:
        if self._like is None:
            super().check(family)
        else:
            self._like.check(family)

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        return super().plan(n_visual, n_layers) if self._like is None else self._like.plan(n_visual, n_layers)

    def merge_tokens(self, tokens: Tensor, clusters: Tensor, width: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._like is not None  # else nothing is recycled
        return self._like.merge_tokens(tokens, clusters, width, valid)
