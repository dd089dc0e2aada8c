"""An unpruned run against what was published: the first sign that something is set, asked or scored differently."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from eval.tasks import SCALES, TASKS

PUBLISHED = Path(__file__).resolve().parents[1] / "published.csv"
_EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
#: Model -> edition and table of SparseVLM's paper, and how many questions of each set it asks (None: all).
TABLES = {
    "llava_1_5_7b": (("v1", "Table 1", None), ("v4", "Table 1", None)),
    "video_llava_7b": (("v1", "Table 2", None), ("v4", "Table 3", 1000)),
}
HALF_A_POINT = 0.5  # of 100
_MOST = {"mme": 2800.0}  # what counts as 100 where the table's unit is no percentage
#: Benchmarks whose published number is of other questions than ours: nothing to compare.
OTHER_SET = {
    "mmbench": "these are 4,329 rows read by rules, the published number is of 4,377 and the server's",
    "pope": "these are 9,000 questions, the published number is of 8,910",
    "vqav2": "these are validation questions, the published number is the test server's",
}
#: Benchmarks of which one metric only measures what was published.
SAME_METRIC = {"seedbench": "seed_all"}


#: Who judged the published numbers: another judge moves scores by several points.
JUDGES = {"mmvet": "gpt-4-0613"} | dict.fromkeys(("tgif", "msvd", "msrvtt", "activitynet"), "gpt-3.5-turbo")


@dataclass(frozen=True)
class Comparison:
    """An unpruned run beside published numbers of the same benchmark.

    Attributes:
        task: name of the benchmark.
        value: of the run, in the papers' unit.
        published: edition -> number, in the same unit; empty where `why_not` says why there is none.
        why_not: why nothing can be compared.
    """

    task: str
    value: float
    published: Mapping[str, float]
    why_not: str = ""

    @property
    def points(self) -> dict[str, float]:
        """Edition -> ours minus published, in points of 100."""
        scale = 100.0 / _MOST.get(self.task, 100.0)
        return {edition: (self.value - number) * scale for edition, number in self.published.items()}

    @property
    def loud(self) -> bool:
        """Whether it is more than half a point from every published number."""
        return bool(self.published) and all(abs(p) > HALF_A_POINT + 1e-9 for p in self.points.values())

    def __str__(self) -> str:
        value = f"{self.task} unpruned: {self.value:.4g}"
        if not self.published:
            return f"{value}, not compared with a published number: {self.why_not}"
        unit = "points of 100" if self.task in _MOST else "points"
        each = [f"{self.points[e]:+.1f} {unit} from {number:g} ({e})" for e, number in self.published.items()]
        if not self.loud:
            return f"{value}, {' and '.join(each)}"
        return (
            f"WARNING: {value}, {' and '.join(each)}: more than half a point from what was published, so something is "
            "set, asked or scored differently; find it before you use the pruned runs"
        )


def compare(metrics: Mapping, config: Mapping) -> Comparison | None:
    """A run beside what was published; None if it is none of the papers' unpruned runs.

    Only whole runs count that were made with the papers' settings (configs/experiment/<model>_paper.yaml), on the
    questions that the edition asks, with every question answered.

    Args:
        metrics, config: the run's metrics.json and config.yaml.
    """
    task, model = TASKS.get(metrics["task"]), metrics["model"]
    if metrics["method"] != "none" or model not in TABLES or task is None or metrics.get("excluded"):
        return None
    editions = [(v, table) for v, table, limit in TABLES[model] if limit == config["limit"]]
    if not editions or not _as_published(config, model):
        return None
    metric = (metrics.get("benchmark") or {}).get("metric")
    if metric not in metrics["metrics"]:
        return None
    value = metrics["metrics"][metric]["value"] * SCALES[task.metrics[metric]]
    if reason := _why_not(task.name, metric, metrics):
        return Comparison(task.name, value, {}, reason)
    found = {f"SparseVLM {v}": number for v, table in editions if (number := _published(v, table, model, task.name))}
    return Comparison(task.name, value, found, "" if found else "the paper has none for it")


def _as_published(config: Mapping, model: str) -> bool:
    wanted = yaml.safe_load((_EXPERIMENTS / f"{model}_paper.yaml").read_text(encoding="utf-8"))["model"]
    options = {k: v[0] for k, v in TASKS[config["task"]["name"]].options.items() if isinstance(v, tuple)}
    task = {**config["task"], **(config["task"].get("options") or {})}
    return (
        all(config["model"].get(k) == v for k, v in wanted.items())
        and all(task.get(k) == v for k, v in options.items())
        and config.get("max_new_tokens") is None
    )


def _why_not(task: str, metric: str, metrics: Mapping) -> str:
    if not_scored := metrics.get("not_scored"):
        return f"{' and '.join(not_scored)} was not judged"
    judge = (metrics["benchmark"].get("judge") or {}).get("model")
    if judge != JUDGES.get(task):
        return f"{judge} judged, the published number is by {JUDGES[task]}"
    if SAME_METRIC.get(task, metric) != metric:
        return f"{metric} is of other questions; the published number is {SAME_METRIC[task]}"
    return OTHER_SET.get(task, "")


@cache
def _published(version: str, table: str, model: str, benchmark: str) -> float | None:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            where = (row["paper"], row["version"], row["table"], row["model"], row["method"])
            what = (row["benchmark"], row["metric"], row["flag"])
            if where == ("SparseVLM", version, table, model, "none") and what == (benchmark, "score", ""):
                return float(row["value"])
    return None
