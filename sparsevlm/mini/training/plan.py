"""What a training run consists of: its settings and its phases."""

from dataclasses import dataclass

from sparsevlm.mini.training.batches import BatchShape


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        objective: ``"align"``, ``"neutral"`` or ``"answer"``.
        shape: of its batches.
        time_share, step_share: of a run that is measured in minutes, and of one measured in steps. The learning-rate
            schedules follow the time shares in both.
    """

    objective: str
    shape: BatchShape
    time_share: float
    step_share: float

    @property
    def name(self) -> str:
        return f"{self.objective} {self.shape.grid}x{self.shape.grid}" + (" clips" if self.shape.clips else "")


#: First small windows, then the whole picture: relations are learnt at few tokens and carried over to 576.
PLAN = (
    Phase("align", BatchShape(grid=8, images=48), time_share=0.13, step_share=0.30),
    Phase("align", BatchShape(grid=24, images=6), time_share=0.03, step_share=0.04),
    Phase("neutral", BatchShape(grid=24, images=6), time_share=0.02, step_share=0.03),
    Phase("answer", BatchShape(grid=8, images=16, questions=8), time_share=0.17, step_share=0.25),
    Phase("answer", BatchShape(grid=12, images=12, questions=12), time_share=0.15, step_share=0.14),
    Phase("answer", BatchShape(grid=16, images=6, questions=24), time_share=0.2, step_share=0.12),
    Phase("answer", BatchShape(grid=24, images=5, questions=24), time_share=0.3, step_share=0.12),
)
#: For a look at how it learns: a few minutes do not suffice for whole pictures, and every phase begins with compiling.
SHORT = (
    Phase("align", BatchShape(grid=8, images=48), time_share=0.45, step_share=0.6),
    Phase("answer", BatchShape(grid=8, images=16, questions=8), time_share=0.55, step_share=0.4),
)
SHORT_MINUTES = 20
#: For a model that answers questions already.
CONTINUATION = (Phase("answer", BatchShape(grid=24, images=5, questions=24), time_share=1.0, step_share=1.0),)
#: For the video model, which starts from the model for pictures.
VIDEO = (Phase("answer", BatchShape(grid=8, images=4, questions=16, clips=True), time_share=1.0, step_share=1.0),)


@dataclass(frozen=True)
class Settings:
    """What decides a run, beside the plan.

    With ``steps`` it is repeatable number by number on the same machine with the same number of threads. With
    ``minutes`` the same data come in the same order, but how many steps fit in depends on the machine.

    Raises:
        ValueError: not exactly one of ``minutes`` and ``steps``, or a value out of range.
    """

    seed: int = 0
    minutes: float | None = None
    steps: int | None = None
    precision: str = "bfloat16"
    video: bool = False

    def __post_init__(self):
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either the minutes or the steps of a training run")
        if (self.steps if self.minutes is None else self.minutes) <= 0:
            raise ValueError("a training run needs more than 0 minutes or steps")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"the seed must be between 0 and 2**32 - 1, got {self.seed}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"unknown precision {self.precision!r}; use bfloat16 or float32")
