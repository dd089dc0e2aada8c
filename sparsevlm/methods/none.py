"""No pruning: the model as it is, with the trace of the others. Bit for bit the unhooked model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.methods.base import Method


@dataclass(frozen=True)
class NoPruning(Method):
    """Keeps every visual token, whatever the budget (so that a sweep over budgets needs no exception for it)."""

    name: ClassVar[str] = "none"
