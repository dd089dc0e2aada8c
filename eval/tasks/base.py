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
    """The checked config group `task`.

    Attributes:
        options: all options of the task with their values.
    """

    name: str
    options: Mapping[str, object] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.options.items(), key=str))))

    @property
    def seed(self) -> int:
        """Which set of test scenes, for generated tasks; 0 for all others."""
        return self.options.get("seed", 0)

    @property
    def judged(self) -> bool:
        """Whether a language model is named that scores the answers."""
        return self.options.get("judge") not in (None, "", EXACT_MATCH)

    def plain(self) -> dict:
        """Return the config group."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class Task:
    """One benchmark, declared once: its entry in the config group `task` is made of this.

    Attributes:
        title: the benchmark's name and split, for people.
        lmms: names of the lmms-eval tasks that it consists of.
        folder: where their YAMLs are: a folder of lmms-eval's tasks, or "own:<folder>" of this one's.
        size: questions of the published data, for progress bars; what is loaded counts otherwise.
        metrics: metric -> its scale (see SCALES). The first is the headline, which goes into the papers' tables.
        ours: those of the metrics that this project computes, because lmms-eval has no such aggregate or counts wrong.
        options: what can be set on the command line as `task.<key>=...` -> its default, or the tuple of its possible
            values, of which the first is the default. A default may name an environment variable, as
            "${oc.env:NAME,null}".
        overrides: settings -> keys of lmms-eval's task configuration to replace.
        until: strings at which an answer ends. None of the benchmarks' authors cuts answers; what lmms-eval puts in
            where a task names none (a blank line) cuts MM-Vet's and the videos' answers short.
        score: makes the samples' scores plain numbers, in place, and returns the metrics that are ours.
        files: makes further files of a run folder, name -> content, of the samples.
        group: what makes questions belong together, from columns of the data: a limit never cuts a group.
        columns: that `group` reads.
        interleave: order the data so that groups take turns (for data sorted by split), rather than whole groups.
        judge: how answers are judged by a language model: a key of `eval.tasks.judgements.JUDGEMENTS`, or None.
        video: questions are about videos; unless generated, these are files, looked for before a model is loaded.
        version: changes when the same settings would ask or score differently; part of a run's identity.
        note: what to know when comparing with the papers.
    """

    name: str
    title: str
    lmms: tuple[str, ...]
    folder: str
    size: int
    metrics: Mapping[str, str]
    ours: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
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
    def config(self) -> dict:
        """The config group `task` with the defaults; environment variables are not filled in yet."""
        defaults = {k: v[0] if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {"name": self.name, **defaults}

    def questions(self, limit: int | None) -> int:
        """How many questions a run with this limit asks, if the data are the published ones."""
        return self.size if limit is None else min(limit, self.size)

    def settings(self, config: Mapping) -> TaskSettings:
        """Check a composed config group; an option that it lacks has its default.

        Raises:
            UserError: an unknown key, or a value that is not possible.
        """
        from omegaconf import OmegaConf  # not needed to measure

        known = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        for key in config:
            if key not in known:
                raise UserError(unknown("config key", f"task.{key}", [f"task.{k}" for k in known]))
        options = {k: v for k, v in {**known, **config}.items() if k != "name"}
        for key, possible in self.options.items():
            if isinstance(possible, tuple) and options[key] not in possible:
                raise UserError(f"task.{key}={options[key]} is unknown; known: {', '.join(map(str, possible))}")
        runs = options.get("judge_runs", 1)
        if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
            raise UserError(f"task.judge_runs={runs} must be an integer of 1 or more")
        if "@" in str(options.get("judge_url")):
            raise UserError(
                "task.judge_url holds a password, and would be written into the results; use OPENAI_API_KEY"
            )
        return TaskSettings(self.name, options)

    def headline(self, settings: TaskSettings) -> str:
        """Return the metric that goes into the papers' tables; without a judge that is exact match."""
        return EXACT_MATCH if self.judge and not settings.judged else next(iter(self.metrics))

    def identity(self, settings: TaskSettings, limit: int | None) -> dict:
        """Everything about the task that changes a run's numbers."""
        unseen = {"judge_timeout"}
        unseen |= set() if settings.judged else {k for k in settings.options if k.startswith("judge")}
        options = {k: v for k, v in settings.options.items() if k not in unseen}
        return {"name": self.name, **options, "version": self.version, "limit": limit}
