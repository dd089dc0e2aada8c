"""The tasks that `eval.run` knows, and where their questions come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval.tasks.minivqa import dataset as minivqa

FOLDER = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Where generated questions are kept: $SPARSEVLM_CACHE, else ~/.cache/sparsevlm."""
    return Path(os.environ.get("SPARSEVLM_CACHE") or Path.home() / ".cache" / "sparsevlm")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        version: changes when the same settings would ask or score differently; part of a run's identity.
        default_questions: how many there are without a limit.
        prepare: (seed, number of questions) -> the entry of lmms-eval's `tasks=[...]`; makes the data if need be.
    """

    version: int
    default_questions: int
    prepare: Callable[[int, int], dict]

    def questions(self, limit: int | None) -> int:
        """How many questions a run with this limit asks."""
        return self.default_questions if limit is None else limit


def _minivqa(seed: int, n: int) -> dict:
    return minivqa.task_override(minivqa.build_dataset(seed, n, cache_dir() / "minivqa"))


TASKS = {"minivqa": Task(minivqa.VERSION, minivqa.DEFAULT_N, _minivqa)}
