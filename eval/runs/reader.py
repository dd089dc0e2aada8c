"""Reading run folders. What is not a whole run of the known schema is refused with its folder's name, never skipped.

`writer.py` says what is in a folder. Accuracy runs are read, and the measurements of `eval/measure`, which have
`rows` instead of metrics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import yaml

from eval.runs.stats import bootstrap_ci
from eval.runs.writer import SCHEMA
from eval.tasks import controls  # noqa: F401  - registers them
from eval.tasks.minivqa.utils import LANGUAGE_CONTROL, VISUAL
from sparsevlm.methods import method_class

LATENCY = "latency"
HALF_PRECISION = "half_precision"
FLOPS = "flops"
LAYERS = "layers"
ROWS_ONLY = (LATENCY, HALF_PRECISION, FLOPS, LAYERS)  # runs that have rows instead of answers
_FILES = ("config.yaml", "metrics.json", "samples.jsonl", "env.json")
_COMMON = ("schema", "task", "model", "n", "versions", "hardware", "git", "date")
_ACCURACY = ("method", "options", "budget", "config_hash", "metrics", "tokens", "cost", "seed")
# Model settings that change answers; device and batch size do not.
_MODEL_KEYS = (
    "pretrained", "revision", "dtype", "attn_implementation", "prompt", "image_aspect_ratio", "min_pixels",
    "max_pixels",
)  # fmt: skip
_NOT_ASKED = ("judge", "metric", "scale")  # keys of the task, by their beginnings; for judges see `_check_group`


class BadRun(Exception):
    """A run folder that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: where it is.
        config: config.yaml.
        metrics: metrics.json.
    """

    folder: Path
    config: dict
    metrics: dict

    @property
    def task(self) -> str:
        return self.metrics["task"]

    @property
    def model(self) -> str:
        return self.metrics["model"]

    @property
    def setting(self) -> str:
        """Method, options and budget as one string: equal for equal settings."""
        return setting_key(self.metrics["method"], self.metrics["options"], self.metrics["budget"])

    @property
    def asked(self) -> dict | None:
        """Digests of what was really asked (see eval/runs/digests.py); None for runs of a version that kept none."""
        return self.metrics.get("asked")

    @property
    def not_scored(self) -> dict[str, str]:
        """Metrics that the run lacks because no language model judged its answers -> why."""
        return self.metrics.get("not_scored", {})

    @property
    def judge(self) -> str | None:
        """The language model that scored the answers; None if none did."""
        judge = (self.metrics.get("benchmark") or {}).get("judge") or {}
        return None if self.not_scored or not judge.get("url") else judge["model"]

    @cached_property
    def samples(self) -> list[dict]:
        """The lines of samples.jsonl."""
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]

    def scores(self, metric: str) -> dict[str, float]:
        """Document id -> score, of the questions that have one."""
        return {str(s["doc_id"]): float(s["scores"][metric]) for s in self.samples if metric in s["scores"]}


def setting_key(method: str, options: dict, budget: int | str | None) -> str:
    """Method, options (defaults filled in) and budget as one string."""
    return json.dumps([method, options, budget], sort_keys=True, default=list)


def label(method: str, options: dict) -> str:
    """Name of a method with those of its options that are not the defaults: "sparsevlm (raters=all)"."""
    try:
        kind = method_class(method)
        defaults, kept = {f.name: f.default for f in fields(kind)}, ["tokens kept: all"] * kind.keeps_tokens
        defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    except ValueError:  # a method of another version of this project
        defaults, kept = {}, []
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    changed = [f"{k}={plain(v)}" for k, v in options.items() if k not in defaults or v != defaults[k]] + kept
    return f"{method} ({', '.join(changed)})" if changed else method


def plain(value) -> str:
    """A value of an option as it is printed: lists with slashes."""
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass
class Group:
    """Accuracy runs that may stand in one table: the same questions, put to the same model in the same way.

    Attributes:
        runs: one per setting, in the order of their folders' names.
    """

    runs: list[Run] = field(default_factory=list)

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def model(self) -> str:
        return self.runs[0].model

    @property
    def n(self) -> int:
        return self.runs[0].metrics["n"]

    @property
    def seed(self) -> int:
        return self.runs[0].metrics["seed"]

    @property
    def name(self) -> str:
        """For files: task, model, number of questions and seed."""
        return f"{self.task}__{self.model}__n{self.n}__seed{self.seed}"

    def scored(self, metric: str) -> Group:
        """Without the runs that lack the metric because no language model judged."""
        return Group([run for run in self.runs if metric not in run.not_scored])

    @property
    def unpruned(self) -> Run | None:
        return next((r for r in self.runs if r.metrics["method"] == "none"), None)


def read_runs(results: Path) -> list[Run]:
    """All runs under `<results>/runs`, by folder name.

    Raises:
        BadRun: there are none, or one is broken, half-written or of another schema.
    """
    parent = results / "runs"
    folders = sorted(p for p in parent.iterdir() if not p.name.startswith(".")) if parent.is_dir() else []
    if not folders:
        raise BadRun(f"no run folders in {parent}: make some with `make reproduce` or `python -m eval.run`")
    return [read_run(folder) for folder in folders]


def unfinished(results: Path) -> list[Path]:
    """Hidden folders of runs that were interrupted; their command, given again, finishes them."""
    parent = results / "runs"
    return sorted(parent.glob(".*.partial")) if parent.is_dir() else []


def read_run(folder: Path) -> Run:
    """One run, checked.

    Raises:
        BadRun: a file is missing or unreadable, the schema is another one, or the numbers contradict the samples.
    """
    try:
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(metrics, dict):
            raise ValueError("config.yaml or metrics.json holds no mapping")
        if metrics.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {metrics.get('schema')!r}, this version reads {SCHEMA}")
        _require(metrics, _COMMON)
        run = Run(folder, config, metrics)
        if run.task == LATENCY:
            _check_latency(run)
        elif run.task in ROWS_ONLY:
            _require(run.metrics, ["rows"])
        else:
            _check_accuracy(run)
            _keep_language_control_apart(run)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        reason = f"it lacks the key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise BadRun(f"{folder} is not a usable run: {reason}. Delete it, or move it away, and run it again") from error
    return run


def _require(mapping: dict, keys: Iterable[str]) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(f"metrics.json lacks {', '.join(missing)}")


def _check_accuracy(run: Run) -> None:
    _require(run.metrics, _ACCURACY)
    m = run.metrics
    name = "__".join(str(m[key]) for key in ("task", "model", "method", "budget", "config_hash"))
    if run.folder.name != name:
        raise ValueError(f"its metrics.json belongs to {name}")
    method = {"name": m["method"], **m["options"]}
    if run.config["method"] != method or (run.config.get("budget") or "explicit") != m["budget"]:
        raise ValueError("config.yaml and metrics.json name different methods, options or budgets")
    samples, n = run.samples, run.metrics["n"]
    if len(samples) != n:
        raise ValueError(f"metrics.json speaks of {n} questions, samples.jsonl has {len(samples)}")
    if len({str(s["doc_id"]) for s in samples}) != n:
        raise ValueError("samples.jsonl has the same question twice")
    for name, metric in run.metrics["metrics"].items():
        scores = run.scores(name)
        if metric["ci95"] is not None and scores:
            mean = math.fsum(scores.values()) / len(scores)
            if not math.isclose(mean, metric["value"], abs_tol=1e-6):
                raise ValueError(f"{name} is {metric['value']}, but the mean of its samples {mean}")


def _keep_language_control_apart(run: Run) -> None:
    """Give a run that was made before it was reported the accuracy without the language control."""
    known = run.metrics["metrics"]
    if VISUAL in known or "accuracy" not in known or not any(map(of_language_control, run.samples)):
        return
    for sample in run.samples:
        if not of_language_control(sample):
            sample["scores"][VISUAL] = sample["scores"]["accuracy"]
    if scores := run.scores(VISUAL):
        mean, low, high = bootstrap_ci(list(scores.values()))
        run.metrics["metrics"] = {VISUAL: {"value": mean, "ci95": [low, high], "n": len(scores)}, **known}


def of_language_control(sample: dict) -> bool:
    """Whether a line of samples.jsonl is a question that needs no picture."""
    return sample.get("question_type") in LANGUAGE_CONTROL


def _check_latency(run: Run) -> None:
    for row in run.metrics["rows"]:
        needed = {"method", "options", "budget", "text_tokens", "batch_size"}
        missing = needed if row.get("failed") else needed | {"prefill_ms", "prefill_ratio"}
        missing = missing - set(row)
        if missing:
            raise ValueError(f"a row lacks {', '.join(sorted(missing))}")


def accuracy_groups(runs: Iterable[Run]) -> list[Group]:
    """Accuracy runs by what they may be compared with, in the order of their names.

    Raises:
        BadRun: two runs of one setting in a group, or runs whose questions differ although their settings agree.
    """
    groups: dict[str, Group] = {}
    for run in runs:
        if run.task not in ROWS_ONLY:
            model = {key: run.config["model"].get(key) for key in _MODEL_KEYS}
            task = {k: v for k, v in run.config["task"].items() if not k.startswith(_NOT_ASKED)}
            same = [run.task, run.model, model, task, run.metrics["n"], run.config.get("max_new_tokens"), run.asked]
            groups.setdefault(json.dumps(same, sort_keys=True, default=str), Group()).runs.append(run)
    for group in groups.values():
        _check_group(group)
    names = [group.name for group in groups.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        folders = [str(g.runs[0].folder) for g in groups.values() if g.name == twice]
        raise BadRun(
            f"{' and '.join(folders)} were made with different settings of the model, or by versions that ask "
            "differently: keep such runs in different results folders"
        )
    return sorted(groups.values(), key=lambda g: g.name)


def _check_group(group: Group) -> None:
    seen: dict[str, Run] = {}
    for run in group.runs:
        other = seen.setdefault(run.setting, run)
        if other is not run:
            raise BadRun(
                f"{other.folder} and {run.folder} are the same setting, made with other weights or another version of "
                "the task: move one away"
            )
    judges = {run.judge: run.folder for run in group.runs if run.judge is not None}
    if len(judges) > 1:
        raise BadRun(
            f"{' and '.join(map(str, judges.values()))} were judged by different models ({', '.join(judges)}): keep "
            "such runs in different results folders"
        )
    first = group.runs[0]
    questions = {(str(s["doc_id"]), s["question"], str(s["target"])) for s in first.samples}
    for run in group.runs[1:]:
        if {(str(s["doc_id"]), s["question"], str(s["target"])) for s in run.samples} != questions:
            raise BadRun(f"{run.folder} and {first.folder} asked different questions: move one of them away")
