"""Random visual tokens at the layers where another method prunes: the control that shows what its choice is worth.

`match="leaving"` or `"entering"`: the layer, budgets and positions are FastV's (see `fastv`). `match="sparsevlm"`: the
layers, numbers of tokens, recycling and positions are SparseVLM's (see `sparsevlm`), so that nothing but the choice of
tokens differs: as many tokens enter and leave each layer, and the language model computes as much. The draw is that of
`random`; at the second and third stage it keeps the best drawn of what is left. It has no publication of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevlm.budget import Schedule
from sparsevlm.methods.base import Method
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

    keep: Sequence[int] | int | None = None
    layers: Sequence[int] | None = None
    seed: int = 0

    name: ClassVar[str] = "random_layer"
    matches: ClassVar[tuple[str, ...]] = (*MATCHES, LIKE_SPARSEVLM)

    def __post_init__(self) -> None:
        self._set("_like", None)
        if self.match != LIKE_SPARSEVLM:
            if self.layers is not None:
                raise ValueError("layers are for match='sparsevlm'. Use k, the number of layers that see everything")
            super().__post_init__()
            return
        if self.k is not None:
            raise ValueError("k does not go with match='sparsevlm'. Use layers")
        Method.__post_init__(self)
        self._set("_like", SparseVLM(budget=self.budget, layers=self.layers, keep=self.keep))
        self._set("layers", self._like.layers)
        self._set("keep", self._like.keep)

    @property
    def needs_text(self) -> bool:
        return self._like is not None

    @property
    def positions(self) -> str:
        return PruneOnce.positions if self._like is None else self._like.positions

    def check(self, family: Family) -> None:
        if self._like is None:
            super().check(family)
        else:
            self._like.check(family)

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        return super().plan(n_visual, n_layers) if self._like is None else self._like.plan(n_visual, n_layers)

    def merge_tokens(self, tokens: Tensor, clusters: Tensor, width: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._like.merge_tokens(tokens, clusters, width, valid)
