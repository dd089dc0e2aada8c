"""Which runs may stand in the paper's tables, and which of their metrics are the paper's.

A run counts for a table if it was made with the table's model (its weights are checked by what a decoded token costs),
with the prompt and the picture padding of the papers, and with a method's default options. The embedded models never
get into such a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scripts.runs import ROWS_ONLY, BadRun, Run
from scripts.summary import label

# experiment=llava_1_5_7b_paper, experiment=video_llava_7b_paper
PAPER_SETTINGS = {
    "llava_1_5_7b": {"prompt": "vicuna_v1", "image_aspect_ratio": "pad"},
    "video_llava_7b": {"prompt": "llava_v1", "image_aspect_ratio": "crop"},
}
# Options of tasks with which the papers ask; another one keeps a run out of their tables.
PAPER_TASKS = {"textvqa": {"ocr": True}, "mmbench": {"prompt": "llava"}}
_DECODE_GMACS = (5.0, 9.0)  # of a 7B model, per token: 6.6 of its weights, the rest its attention to the prompt
_EMBEDDED = ("mini", "mini-video")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper.

    Attributes:
        task: name of the task, and of the benchmark in `eval/published.csv`.
        label: in a table's head.
        metrics: what the paper reports: sums of a run's metrics with their factors; the first that a run has counts.
        published: metric in `eval/published.csv`.
        digits: after the point.
    """

    task: str
    label: str
    metrics: Sequence[dict[str, float]]
    published: str = "score"
    digits: int = 1


def _of(metric: str, factor: float = 100.0) -> tuple[dict[str, float], ...]:
    return ({metric: factor},)


GQA = Benchmark("gqa", "GQA", _of("exact_match"))
MMBENCH = Benchmark("mmbench", "MMB", _of("circular_accuracy", 1))
MME = Benchmark("mme", "MME", (*_of("mme_total", 1), {"mme_perception_score": 1, "mme_cognition_score": 1}), digits=0)
POPE = Benchmark("pope", "POPE", _of("pope_f1_mean", 1))
SCIENCEQA = Benchmark("scienceqa", "SQA", _of("exact_match"))
VQAV2 = Benchmark("vqav2", "VQAv2", _of("exact_match"))
TEXTVQA = Benchmark("textvqa", "TextVQA", _of("exact_match"))
CONBENCH = Benchmark("conbench", "ConBench", _of("ConScore_D"))
SEEDBENCH = Benchmark("seedbench", "SEED", _of("seed_image"))
MMVET = Benchmark("mmvet", "MM-Vet", _of("gpt_eval_score"))
VIDEO = tuple(
    Benchmark(task, f"{name} {what}", _of(metric, factor), published, digits)
    for task, name in (("tgif", "TGIF"), ("msvd", "MSVD"), ("msrvtt", "MSRVTT"), ("activitynet", "ActivityNet"))
    for what, metric, factor, published, digits in (
        ("accuracy", "gpt_accuracy", 100, "score", 1),
        ("score", "gpt_score", 1, "judge_score", 2),
    )
)


def is_model(run: Run, model: str) -> bool:
    """Whether a run was made with a model of the papers.

    Raises:
        BadRun: the run says so, but its weights are others.
    """
    if run.task in ROWS_ONLY or run.model != model:
        return False
    pretrained = run.config["model"]["pretrained"]
    cost = run.metrics["cost"].get("decode_gmacs_per_token")
    if pretrained in _EMBEDDED or (cost is not None and not _DECODE_GMACS[0] < cost < _DECODE_GMACS[1]):
        per_token = "" if cost is None else f", a token of which costs {cost:.3f} GMACs instead of 6.6"
        raise BadRun(
            f"{run.folder} says that its model is {model}, but its weights are {pretrained}{per_token}: delete it, or "
            "give its model another name (model.name=...)"
        )
    return True


JUDGED = (MMVET, *VIDEO)


def as_in_the_papers(run: Run) -> bool:
    """Whether prompt, picture padding and options of the task are those of the papers."""
    task = {**run.config["task"], **(run.config["task"].get("options") or {})}
    asked = ((run.config["model"], PAPER_SETTINGS[run.model]), (task, PAPER_TASKS.get(run.task, {})))
    return all(have.get(key, want) == want for have, wanted in asked for key, want in wanted.items())


def paper_runs(runs: Iterable[Run], model: str) -> dict[tuple[str, str, int | str], Run]:
    """Task, label of the method, and budget -> run, of the runs that may stand in a table of `model`.

    A full run comes before one on the first questions only, of which the longest counts.

    Raises:
        BadRun: two runs of one setting and equal length, or weights that are not the model's.
    """
    found: dict[tuple[str, str, int | str], Run] = {}
    for run in runs:
        if not is_model(run, model) or not as_in_the_papers(run):
            continue
        m = run.metrics
        key = run.task, label(m["method"], m["options"]), m["budget"]
        other = found.get(key)
        if other is not None and _length(other) == _length(run):
            raise BadRun(
                f"{other.folder} and {run.folder} are the same setting, made with other weights, another dtype or "
                "another version of the task: move one away"
            )
        if other is None or _length(run) > _length(other):
            found[key] = run
    return found


def _length(run: Run) -> float:
    return run.metrics["n"] if limited(run) else float("inf")


def limited(run: Run) -> bool:
    """Whether a run is not about all questions of its task: it asked only the first, or could not answer some."""
    return run.config.get("limit") is not None or bool(run.metrics.get("excluded"))


def left_out(runs: Iterable[Run], model: str) -> int:
    """How many runs of a model were made with other settings than the papers'."""
    return sum(is_model(run, model) and not as_in_the_papers(run) for run in runs)


def value(run: Run, benchmark: Benchmark) -> float:
    """What the paper reports of a benchmark, from a run.

    Raises:
        BadRun: the run has none of the metrics.
    """
    have = run.metrics["metrics"]
    for metrics in benchmark.metrics:
        if all(name in have for name in metrics):
            return sum(factor * have[name]["value"] for name, factor in metrics.items())
    wanted = " or ".join(" + ".join(metrics) for metrics in benchmark.metrics)
    raise BadRun(f"{run.folder} has no {wanted}, which the tables show of {run.task}; it has {', '.join(have)}")
