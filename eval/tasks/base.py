"""What a task is, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from eval.errors import UserError, unknown

#: scale of a metric -> what its value is multiplied by in the papers' tables.
SCALES = {"fraction": 100.0, "percent": 1.0, "points": 1.0, "count": 1.0}
EXACT_MATCH = "exact_match"
NO_JUDGE = "no language model was named to judge: task.judge=<model>, or SPARSEVLM_JUDGE"


@dataclass(frozen=True)
class TaskSettings:
    """Config group `task`.

    Attributes:
        seed: which set of test scenes, for generated tasks; 0 for all others.
        options: the rest of the YAML: `metric` and `scale` of the number that goes into the papers' tables, and what
            else the task can be asked for.
    """

    name: str
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, self.seed, tuple(sorted(self.options.items(), key=str))))

    @property
    def judged(self) -> bool:
        """Whether a language model is named that scores the answers."""
        return self.options.get("judge") not in (None, "", EXACT_MATCH)

    def plain(self) -> dict:
        """As in the YAML."""
        seed = {} if self.options else {"seed": self.seed}
        return {"name": self.name, **seed, **self.options}


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        lmms: names of the lmms-eval tasks that it consists of.
        folder: where their YAMLs are: a folder of lmms-eval's tasks, or "own:<folder>" of this one's.
        size: questions of the published data, for progress bars; what is loaded counts otherwise.
        metrics: what can be the headline -> its scale (see SCALES).
        ours: those of the metrics that this project computes, because lmms-eval has no such aggregate or counts wrong.
        options: further keys of the YAML -> the values they may have (None: free).
        overrides: settings -> keys of lmms-eval's task configuration to replace.
        until: strings at which an answer ends. None of the benchmarks' authors cuts answers; what lmms-eval puts in
            where a task names none (a blank line) cuts MM-Vet's and the videos' answers short.
        score: makes the samples' scores plain numbers, in place, and returns the metrics that are ours.
        files: makes further files of a run folder, name -> content, of the samples.
        group: what makes questions belong together, from columns of the data: a limit never cuts a group.
        columns: that `group` reads.
        interleave: order the data so that groups take turns (for data sorted by split), rather than whole groups.
        judge: how answers are judged by a language model: a key of `eval.judgements.JUDGEMENTS`, or None.
        video: questions are about videos; unless generated, these are files, looked for before a model is loaded.
        version: changes when the same settings would ask or score differently; part of a run's identity.
        note: what to know when comparing with the papers.
    """

    name: str
    lmms: tuple[str, ...]
    folder: str
    size: int
    metrics: Mapping[str, str]
    ours: tuple[str, ...] = ()
    options: Mapping[str, tuple | None] = field(default_factory=dict)
    overrides: Callable[[TaskSettings], dict] = lambda settings: {}
    until: tuple[str, ...] = ()
    score: Callable[[Sequence[dict]], dict[str, float]] = lambda samples: {}
    files: Callable[[Sequence[dict], TaskSettings], dict[str, str]] = lambda samples, settings: {}
    group: Callable[..., Hashable] | None = None
    columns: tuple[str, ...] = ()
    interleave: bool = False
    judge: str | None = None
    video: bool = False
    version: int = 2  # 1 cut answers at blank lines and read them by lmms-eval's rules
    note: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the YAML, `name` excepted."""
        return ("metric", "scale", *self.options)

    def questions(self, limit: int | None) -> int:
        """How many questions a run with this limit asks, if the data are the published ones."""
        return self.size if limit is None else min(limit, self.size)

    def settings(self, config: Mapping) -> TaskSettings:
        """Check a composed config group.

        Raises:
            UserError: a key that is missing or unknown, or a value that is not possible.
        """
        options = {k: v for k, v in config.items() if k != "name"}
        for key in options:
            if key not in self.keys:
                raise UserError(unknown("config key", f"task.{key}", [f"task.{k}" for k in ("name", *self.keys)]))
        if missing := [k for k in self.keys if k not in options]:
            raise UserError(
                f"task {self.name} lacks {', '.join(missing)}: configs/task/{self.name}.yaml lists all keys"
            )
        for key, known in self.options.items():
            if known is not None and options[key] not in known:
                raise UserError(f"task.{key}={options[key]} is unknown; known: {', '.join(map(str, known))}")
        metric, scale = options["metric"], options["scale"]
        if metric not in self.metrics:
            raise UserError(unknown("metric", metric, self.metrics))
        if scale != self.metrics[metric]:
            raise UserError(f"task.scale={scale}, but {metric} is in {self.metrics[metric]}")
        runs = options.get("judge_runs", 1)
        if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
            raise UserError(f"task.judge_runs={runs} must be an integer of 1 or more")
        if "@" in str(options.get("judge_url")):
            raise UserError(
                "task.judge_url holds a password, and would be written into the results; use OPENAI_API_KEY"
            )
        return TaskSettings(self.name, 0, options)

    def headline(self, settings: TaskSettings) -> str:
        """The metric that goes into the tables; without a judge that can only be exact match."""
        return EXACT_MATCH if self.judge and not settings.judged else str(settings.options["metric"])

    def identity(self, settings: TaskSettings, limit: int | None) -> dict:
        """Everything about the task that changes a run's numbers."""
        unseen = {"metric", "scale", "judge_timeout"}
        unseen |= set() if settings.judged else {k for k in settings.options if k.startswith("judge")}
        options = {k: v for k, v in settings.options.items() if k not in unseen}
        return {"name": self.name, **options, "version": self.version, "limit": limit}
