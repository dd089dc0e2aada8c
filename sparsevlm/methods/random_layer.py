"""Random visual tokens at the layer where FastV prunes: the control that shows what FastV's score is worth.

Layers, budgets and positions are FastV's (see `fastv`), the draw is that of `random`. It has no publication of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.methods.fastv import FastV
from sparsevlm.methods.random import Random


@dataclass(frozen=True)
class RandomLayer(FastV):
    """Keep uniformly drawn visual tokens from layer K on. Further options as in `FastV`.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random_layer"
    needs_text: ClassVar[bool] = False

    begin = Random.begin
    score = Random.score
