"""The outcome of a pruning point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Decision:
    """Which visual tokens of a stage stay. The lists are per sample and known to the host.

    Attributes:
        layer: the stage; -1 = the language model's input.
        order: [B, V] int64, positions among the visual tokens from high to low score.
        keep, pool, merged: tokens kept; dropped ones that are recycled; tokens these become.
        uniform: whether the counts are the same for all samples.
    """

    layer: int
    order: Tensor
    keep: list[int]
    pool: list[int]
    merged: list[int]
    uniform: bool
