"""The tasks that `eval.run` knows.

A task is one of lmms-eval's, or a YAML under this folder. What this project changes about it (the papers' prompt, whole
groups under a limit, a headline that lmms-eval does not aggregate) is in `benchmarks.py` and `further.py`; what is read
out of an answer in `readings.py`, and what becomes of it in `scores.py`. `loading.py` builds a task and looks for
everything that can be wrong before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from eval.errors import UserError, unknown
from eval.tasks.base import SCALES, Task, TaskSettings
from eval.tasks.benchmarks import BENCHMARKS
from eval.tasks.folders import FOLDER, cache_dir
from eval.tasks.further import FURTHER
from eval.tasks.generated import GENERATED

__all__ = ["FOLDER", "SCALES", "TASKS", "Task", "TaskSettings", "cache_dir", "load", "task_settings"]

TASKS = {task.name: task for task in (*GENERATED, *BENCHMARKS, *FURTHER)}


def task_settings(config: Mapping) -> TaskSettings:
    """The checked config group `task`.

    Raises:
        UserError: an unknown task or key, or a value that is not possible.
    """
    name = config.get("name")
    if name not in TASKS:
        raise UserError(unknown("task", name, TASKS))
    return TASKS[name].settings(config)


def load(settings: TaskSettings, limit: int | None):
    """The task with its questions, ready for lmms-eval; see `eval.tasks.loading.load`."""
    from eval.tasks.loading import load as load_task

    return load_task(TASKS[settings.name], settings, limit)
