"""The tasks that `eval.run` knows.

    python -m eval.tasks        lists them with their options

A task is one `Task(...)` in `benchmarks.py` (the papers') or `further.py` (all others): which task of lmms-eval, or
which folder beside this file, it is, and what this project changes about it (the papers' prompt, whole groups under a
limit, a headline that lmms-eval does not aggregate). `readings.py` reads answers, `scores.py` aggregates them, and
`loading.py` builds a task and checks everything it needs before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from eval.errors import UserError, unknown
from eval.tasks.base import SCALES, Task, TaskSettings
from eval.tasks.benchmarks import BENCHMARKS
from eval.tasks.folders import FOLDER, cache_dir
from eval.tasks.further import FURTHER
from eval.tasks.generated import GENERATED

__all__ = ["FOLDER", "SCALES", "TASKS", "Task", "TaskSettings", "cache_dir", "load", "task_settings", "unknown_task"]

TASKS = {task.name: task for task in (*GENERATED, *BENCHMARKS, *FURTHER)}


def task_settings(config: Mapping) -> TaskSettings:
    """Check the config group `task`.

    Raises:
        UserError: an unknown task or key, or a value that is not possible.
    """
    name = config.get("name")
    if name not in TASKS:
        raise UserError(unknown_task(name))
    return TASKS[name].settings(config)


def unknown_task(name: object) -> str:
    """Return the message for a task that is not declared."""
    return f"{unknown('task', name, TASKS)}. Declare a further task of lmms-eval in eval/tasks/further.py"


def load(settings: TaskSettings, limit: int | None):
    """Load a task with its questions, ready for lmms-eval; see `eval.tasks.loading.load`."""
    from eval.tasks.loading import load as load_task

    return load_task(TASKS[settings.name], settings, limit)
