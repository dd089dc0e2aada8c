"""The questions of a task as lmms-eval's requests."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from eval.tasks import TaskSettings, load

if TYPE_CHECKING:
    from eval.tasks.loading import Loaded

SEED = 1234  # of what a task draws while it asks and scores, lmms-eval's own


@dataclass
class Questions:
    """One task of lmms-eval with its requests.

    Attributes:
        task: lmms-eval's object.
        documents: split -> documents.
        requests: one for each question.
    """

    task: object
    documents: object
    requests: list


@lru_cache(maxsize=1)
def load_questions(
    settings: TaskSettings, limit: int | None, max_new_tokens: int | None
) -> tuple[Loaded, dict[str, Questions]]:
    loaded, out = load(settings, limit), {}
    for task in loaded.tasks:
        if max_new_tokens:
            task.set_config("generation_kwargs", {"max_new_tokens": max_new_tokens}, update=True)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
        build_requests(task.build_all_requests, limit=limit)
        out[task.config.task] = Questions(task, task.dataset, list(task.instances))
    return loaded, out


def build_requests(build: Callable, **arguments) -> None:
    """Build requests without lmms-eval's progress bar, which would appear again for every run."""
    with redirect_stderr(io.StringIO()):
        build(**arguments)


def quiet() -> None:
    from datasets import disable_progress_bars
    from loguru import logger

    logger.remove()  # lmms-eval reports every step at level INFO
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    disable_progress_bars()
