"""Tasks whose questions are generated, never downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eval.errors import UserError
from eval.tasks.base import Task, TaskSettings
from eval.tasks.folders import cache_dir
from eval.tasks.minivqa import dataset as minivqa
from eval.tasks.minivqa.utils import VISUAL
from eval.tasks.minivqa_video import dataset as minivqa_video


@dataclass(frozen=True)
class Generated(Task):
    """A task with a seed.

    Attributes:
        build: (seed, questions, folder for such data) -> the folder that holds the task's questions, made if need be.
    """

    build: Callable[[int, int, Path], Path] = minivqa.build_dataset

    def questions(self, limit: int | None) -> int:
        return self.size if limit is None else limit

    def settings(self, config: Mapping) -> TaskSettings:
        settings = super().settings(config)
        if not isinstance(settings.seed, int) or isinstance(settings.seed, bool) or settings.seed < 0:
            raise UserError(f"task.seed={settings.seed} must be an integer of 0 or more")
        return settings

    def identity(self, settings: TaskSettings, limit: int | None) -> dict:
        return {"name": self.name, "seed": settings.seed, "version": self.version, "limit": self.questions(limit)}

    def prepare(self, seed: int, n: int) -> dict:
        """For lmms-eval's `tasks=[...]`; makes the data if need be."""
        return minivqa.task_override(self.build(seed, n, cache_dir() / self.folder.removeprefix("own:")), self.name)


def _generated(name: str, title: str, data, video: bool = False, folder: str | None = None) -> Generated:
    """The task of a folder beside this file, by default of its own name, whose module `dataset` is `data`."""
    return Generated(
        name=name,
        title=title,
        lmms=(name,),
        folder=f"own:{folder or name}",
        size=data.DEFAULT_N,
        metrics={"accuracy": "fraction"} if video else {VISUAL: "fraction", "accuracy": "fraction"},
        options={"seed": 0},
        video=video,
        version=data.VERSION,
        build=data.build_dataset,
    )


GENERATED = (
    _generated("minivqa", "generated scenes of handwritten digits and drawn shapes", minivqa),
    _generated("minivqa_blind", "the questions of minivqa without pictures, a control", minivqa, folder="minivqa"),
    _generated("minivqa_video", "generated clips of digits and shapes that come, move and leave", minivqa_video, True),
)
