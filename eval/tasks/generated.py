"""Tasks whose questions are generated, never downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eval.errors import UserError, unknown
from eval.tasks.base import Task, TaskSettings
from eval.tasks.folders import cache_dir
from eval.tasks.minivqa import dataset as minivqa


@dataclass(frozen=True)
class Generated(Task):
    """A task with a seed."""

    def questions(self, limit: int | None) -> int:
        return self.size if limit is None else limit

    def settings(self, config: Mapping) -> TaskSettings:
        for key in config:
            if key not in ("name", "seed"):
                raise UserError(unknown("config key", f"task.{key}", ["task.name", "task.seed"]))
        if "seed" not in config:
            raise UserError(f"task {self.name} lacks seed: configs/task/{self.name}.yaml lists all keys")
        seed = config["seed"]
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"task.seed={seed} must be an integer of 0 or more")
        return TaskSettings(self.name, seed)

    def headline(self, settings: TaskSettings) -> str:
        return next(iter(self.metrics))

    def identity(self, settings: TaskSettings, limit: int | None) -> dict:
        return {"name": self.name, "seed": settings.seed, "version": self.version, "limit": self.questions(limit)}

    def prepare(self, seed: int, n: int) -> dict:
        """For lmms-eval's `tasks=[...]`; makes the data if need be."""
        return minivqa.task_override(minivqa.build_dataset(seed, n, cache_dir() / "minivqa"))


GENERATED = (
    Generated(
        name="minivqa",
        lmms=("minivqa",),
        folder="own:minivqa",
        size=minivqa.DEFAULT_N,
        metrics={"accuracy": "fraction"},
        version=minivqa.VERSION,
    ),
)
