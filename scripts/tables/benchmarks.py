"""Which runs may stand in the paper's tables, and which of their metrics are the paper's.

A run counts for a table if it was made with the table's model (its weights are checked by what a decoded token costs),
with the prompt and the picture padding of the papers, and with a method's default options. The embedded models never
get into such a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.runs.reader import ROWS_ONLY, BadRun, Run, label

# experiment=llava_1_5_7b_paper, experiment=video_llava_7b_paper
PAPER_SETTINGS = {
    "llava_1_5_7b": {"prompt": "vicuna_v1", "image_aspect_ratio": "pad"},
    "video_llava_7b": {"prompt": "llava_v1", "image_aspect_ratio": "crop"},
    # experiment=qwen2_vl_7b_paper: about 1320 visual tokens whatever the picture, as the paper's Table 2 has it
    "qwen2_vl_7b": {"prompt": "hub", "min_pixels": 1003520, "max_pixels": 12845056},
}
# Options of tasks with which the papers ask; another one keeps a run out of their tables.
PAPER_TASKS = {"textvqa": {"ocr": True}, "mmbench": {"prompt": "llava"}}
_DECODE_GMACS = (5.0, 9.0)  # of a 7B model, per token: 6.6 of its weights, the rest its attention to the prompt
_EMBEDDED = ("mini", "mini-video", "mini-guide")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper.

    Attributes:
        task: name of the task, and of the benchmark in `eval/published.csv`.
        label: in a table's head.
        metrics: what the paper reports: sums of a run's metrics with their factors; the first that a run has counts.
        published: metric in `eval/published.csv`.
        digits: after the point.
        apart: "" if our runs ask the questions of the published column and read the answers by the same rule. Else the
            head of a column of their own: numbers that measure different things never stand in one cell.
        remark: what is different there, for the caption.
        judge: the language model that judged the published numbers; another one is named in the cell.
    """

    task: str
    label: str
    metrics: Sequence[dict[str, float]]
    published: str = "score"
    digits: int = 1
    apart: str = ""
    remark: str = ""
    judge: str = ""

    @property
    def ours(self) -> str:
        """Head of the column that our numbers stand in."""
        return self.apart or self.label


def _of(metric: str, factor: float = 100.0) -> tuple[dict[str, float], ...]:
    return ({metric: factor},)


GQA = Benchmark("gqa", "GQA", _of("exact_match"))
MMBENCH = Benchmark(
    "mmbench", "MMB", _of("circular_accuracy", 1), apart="MMB (4,329 rows)",
    remark="ours are the data set's rows of MMBench's dev split, read by lmms-eval's rules; published: the 4,377 rows "
    "of mmbench_dev_20230712, scored by MMBench's server",
)  # fmt: skip
MME = Benchmark("mme", "MME", (*_of("mme_total", 1), {"mme_perception_score": 1, "mme_cognition_score": 1}), digits=0)
POPE = Benchmark(
    "pope", "POPE", _of("pope_f1_mean", 1), apart="POPE (9,000)",
    remark="ours has 3,000 random questions, of POPE's later edition; published: 2,910, of its first (8,910 in all)",
)  # fmt: skip
SCIENCEQA = Benchmark("scienceqa", "SQA", _of("exact_match"))
VQAV2 = Benchmark(
    "vqav2", "VQAv2", _of("exact_match"), apart="VQAv2 (val)",
    remark="ours is the validation split; published: test-dev, scored by the test server (`task=vqav2_testdev` writes "
    "what it takes)",
)  # fmt: skip
TEXTVQA = Benchmark("textvqa", "TextVQA", _of("exact_match"))
TEXTVQA_OCR = Benchmark(
    "textvqa", "TextVQA", _of("exact_match"), apart="TextVQA (with OCR tokens)",
    remark="ours lists OCR tokens in the question; whether the paper's did is unsaid",
)  # fmt: skip
CONBENCH = Benchmark("conbench", "ConBench", _of("ConScore_D"))
SEEDBENCH = Benchmark(
    "seedbench", "SEED", _of("seed_all"),
    remark="all questions; ours shows a video by the middle one of the data set's frames, LLaVA's script by the middle "
    "frame of the video; unpruned, LLaVA reports 58.6 (66.1 over pictures alone), SparseVLM's paper 60.3",
)  # fmt: skip
MMVET = Benchmark("mmvet", "MM-Vet", _of("gpt_eval_score"), judge="gpt-4-0613")
VIDEO = tuple(
    Benchmark(task, f"{name} {what}", _of(metric, factor), published, digits, judge="gpt-3.5-turbo")
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
    _check_asked_alike(found.values())
    return found


def _check_asked_alike(runs: Iterable[Run]) -> None:
    """Numbers of one column are of one way of asking.

    Raises:
        BadRun: two runs of equal length on one task were asked differently.
    """
    first: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = first.setdefault((run.task, run.metrics["n"]), run)
        if other.asked != run.asked:
            raise BadRun(
                f"{other.folder} and {run.folder} were made by versions of this project that ask differently (prompt, "
                "pixels or stop strings): move one away"
            )


def _length(run: Run) -> float:
    return run.metrics["n"] if limited(run) else float("inf")


def limited(run: Run) -> bool:
    """Whether a run is not about all questions of its task: it asked only the first, or could not answer some."""
    return run.config.get("limit") is not None or bool(run.metrics.get("excluded"))


def left_out(runs: Iterable[Run], model: str) -> int:
    """How many runs of a model were made with other settings than the papers'."""
    return sum(is_model(run, model) and not as_in_the_papers(run) for run in runs)


def other_judge(run: Run, benchmark: Benchmark) -> str:
    """The language model that judged a run, if it is not the one that judged the published numbers; else ""."""
    judge = (run.metrics.get("benchmark") or {}).get("judge") or {}
    return "" if not benchmark.judge or judge.get("model") in (None, benchmark.judge) else judge["model"]


def value(run: Run, benchmark: Benchmark) -> float | None:
    """What the paper reports of a benchmark, from a run; None where a language model should have judged and did not.

    Raises:
        BadRun: the run has none of the metrics.
    """
    have = run.metrics["metrics"]
    for metrics in benchmark.metrics:
        if all(name in have for name in metrics):
            return sum(factor * have[name]["value"] for name, factor in metrics.items())
    if benchmark in JUDGED and run.judge is None:
        return None
    wanted = " or ".join(" + ".join(metrics) for metrics in benchmark.metrics)
    raise BadRun(f"{run.folder} has no {wanted}, which the tables show of {run.task}; it has {', '.join(have)}")
