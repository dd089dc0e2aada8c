"""What is kept of an answer, sent to a judge, read and scored, against recordings of the authors' scripts.

The rows are laid out as the hub has them, asked of a model that says what was recorded, and scored as in a run.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import pytest

from eval.tasks import TASKS, readings
from tests.eval.tasks import recorded
from tests.eval.tasks.asked import evaluate, loaded, outcome
from tests.eval.tasks.conftest import used
from tests.eval.tasks.judge_server import endpoint
from tests.goldens.load import files, stem

pytestmark = pytest.mark.recordings
READINGS = {
    "gqa": readings.gqa, "textvqa": readings.vqa, "vqav2": readings.vqa, "pope": readings.pope,
    "scienceqa": readings.scienceqa, "mme": readings.mme,
}  # fmt: skip
ALL = ("usual", "unusual")
POPE_METRICS = ("accuracy", "precision", "recall", "yes_ratio")
POPE = {
    "Accuracy": "accuracy",
    "Precision": "precision",
    "Recall": "recall",
    "F1 score": "f1",
    "Yes ratio": "yes_ratio",
}
TOTALS = {"score": "gpt_score", "all": "seed_all", "image": "seed_image", "video": "seed_video"}


@lru_cache(maxsize=1)
def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def of(path: Path, benchmark: str, kinds=ALL) -> list[dict]:
    return [row for row in read(path)["rows"] if row["benchmark"] == benchmark and row["kind"] in kinds]


BENCHMARKS = sorted({(path, row["benchmark"]) for path in files("eval", "scoring*.json") for row in read(path)["rows"]})
each_benchmark = pytest.mark.parametrize(
    ("path", "benchmark"), BENCHMARKS, ids=lambda value: value if isinstance(value, str) else stem(value)
)


class Runs:
    """A file's rows as runs of their benchmarks.

    Attributes:
        texts: benchmark -> what was kept of each answer, in the order of the rows.
        requests: what the judge was asked, likewise.
        samples: of lmms-eval, likewise.
        metrics: benchmark -> what came out.
    """

    def __init__(self, path: Path, kinds: tuple[str, ...], home: Path) -> None:
        rows = {name: of(path, name, kinds) for file, name in BENCHMARKS if file == path}
        replies = {r["judge"][-1]["sha256"]: r["judge_reply"] for each in rows.values() for r in each if "judge" in r}
        with pytest.MonkeyPatch.context() as patch, used(home), endpoint() as judge:
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.setenv("SPARSEVLM_CACHE", str(home / "cache"))
            judge.reply = lambda messages: replies.get(digest(messages[-1]["content"]), "unexpected")
            tasks = {}
            for name, each in rows.items():
                recorded.write(home, name, each)
                once = {"judge_runs": 1} if "judge_runs" in TASKS[name].options else {}
                tasks[name] = loaded(name, judge_url=judge.url, **once)
            names = {task.config.task: name for name, one in tasks.items() for task in one.tasks}
            model = recorded.Recorded([row for each in rows.values() for row in each], names)
            everything = [task for one in tasks.values() for task in one.tasks]
            evaluated = evaluate(everything, next(iter(tasks.values())).manager, model, home)
            outcomes = {name: outcome(one, evaluated) for name, one in tasks.items()}
        asked = {digest(request["messages"][-1]["content"]): request for request in judge.requests}
        self.metrics = {name: metrics for name, (_, metrics) in outcomes.items()}
        self.texts, self.samples, self.requests = {}, {}, {}
        for name, each in rows.items():
            samples = {recorded.key(sample["doc"]): sample for sample in outcomes[name][0]}
            self.texts[name] = [model.texts[name, recorded.key(row["doc"])] for row in each]
            self.samples[name] = [samples[recorded.key(row["doc"])] for row in each]
            self.requests[name] = [asked.get(row["judge"][-1]["sha256"]) if "judge" in row else None for row in each]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    known = {}

    def get(path: Path, kinds: tuple[str, ...] = ALL) -> Runs:
        if (path, kinds) not in known:
            known[path, kinds] = Runs(path, kinds, tmp_path_factory.mktemp("recorded"))
        return known[path, kinds]

    return get


def scored(sample: dict, headline: str) -> float:
    """A question's score, from 0 to 1."""
    if headline not in sample:
        return sample["correct"]
    return sample[headline] / (100 if headline in IN_PERCENT else 1)


FRACTIONS = {name for task in TASKS.values() for name, scale in task.metrics.items() if scale == "fraction"}
FRACTIONS |= {"seed_image", "seed_video"}
IN_PERCENT = {name for task in TASKS.values() for name, scale in task.metrics.items() if scale == "percent"}


@each_benchmark
def test_answers_are_kept_whole(runs, path, benchmark):
    assert runs(path).texts[benchmark] == [row["text"] for row in of(path, benchmark)]


@each_benchmark
def test_scores(runs, path, benchmark):
    rows, samples = of(path, benchmark), runs(path).samples[benchmark]
    headline = next(iter(runs(path).metrics[benchmark]))
    got = {row["id"]: scored(sample, headline) for row, sample in zip(rows, samples, strict=True)}
    assert got == pytest.approx({row["id"]: row["score"] for row in rows})
    ratings = {row["id"]: row["judge_score"] for row in rows if "judge_score" in row}
    assert ratings == {r["id"]: s["gpt_score"] for r, s in zip(rows, samples, strict=True) if r["id"] in ratings}


@each_benchmark
def test_readings(path, benchmark):
    rows = [row for row in of(path, benchmark) if "parsed" in row and benchmark in READINGS]
    assert [READINGS[benchmark](row["text"]) for row in rows] == [row["parsed"] for row in rows]


@each_benchmark
def test_requests_to_the_judge(runs, path, benchmark):
    for row, request in zip(of(path, benchmark), runs(path).requests[benchmark], strict=True):
        if "judge" in row:
            assert request is not None, row["id"]
            messages = [(m["role"], len(m["content"]), digest(m["content"])) for m in request["messages"]]
            assert messages == [(m["role"], m["length"], m["sha256"]) for m in row["judge"]]
            rest = {k: v for k, v in request.items() if k not in ("model", "messages", "path", "key")}
            assert rest == {k: v for k, v in row["judge_settings"].items() if k != "model"}


@each_benchmark
def test_totals(runs, path, benchmark):
    """Over the usual rows; ours in percent, MME's in points."""
    metrics, want = runs(path, ("usual",)).metrics[benchmark], read(path)["aggregates"][benchmark]
    fractions = {k for task in TASKS.values() for k, scale in task.metrics.items() if scale == "fraction"}
    ours = {
        name: 100 * value if name in fractions | {"seed_image", "seed_video"} else value
        for name, value in metrics.items()
    }
    for name, value in want.items():
        if name == "categories":
            assert {category: ours[f"mme_{category}"] for category in value} == pytest.approx(value)
        elif name in ("adversarial", "popular", "random"):
            found = {key: ours[f"pope_{short}_{name}"] / 100 for key, short in POPE.items()}
            assert found == pytest.approx(value)
        elif name != "printed":  # a text; "accuracy" is the same number
            printed = 0.005 if name in ("all", "image", "video", "printed_img") else 1e-9
            assert ours[TOTALS.get(name) or next(iter(ours))] == pytest.approx(value, abs=printed), name
