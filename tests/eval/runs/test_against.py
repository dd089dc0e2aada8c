"""An unpruned run with the papers' settings is compared with what was published, and nothing else is."""

import csv

import pytest

from eval.runs import series
from eval.runs.against import PUBLISHED, compare
from eval.runs.configs import CONFIGS
from eval.tasks import TASKS
from tests.eval.runs.test_settings import compose


def run(task="gqa", value=0.619, model="llava_1_5_7b", metric=None, limit=None, **changes):
    """(metrics.json, config.yaml) of a made-up unpruned run, as far as they are read."""
    config = compose(f"experiment={model}_paper", f"task={task}")
    headline = metric or next(iter(TASKS[task].metrics))
    metrics = {
        "task": task, "model": model, "method": "none", "excluded": 0, "benchmark": {"metric": headline},
        "metrics": {headline: {"value": value}}, **changes,
    }  # fmt: skip
    return metrics, {**config, "limit": limit}


@pytest.mark.parametrize(
    ("task", "value", "text", "loud"),
    [
        ("gqa", 0.619, "gqa unpruned: 61.9, +0.0 points from 61.9 (SparseVLM v1) and +0.0", False),
        ("gqa", 0.6239, "+0.5 points", False),
        ("gqa", 0.624, "+0.5 points", False),  # half a point is not above half a point
        ("gqa", 0.6241, "+0.5 points", True),
        ("gqa", 0.60, "WARNING: gqa unpruned: 60, -1.9 points from 61.9", True),
        ("textvqa", 0.577, "-0.5 points from 58.2 (SparseVLM v1) and -0.6 points from 58.3 (SparseVLM v4)", False),
        ("textvqa", 0.5881, "+0.6 points from 58.2 (SparseVLM v1) and +0.5", True),
        ("mme", 1850.0, "-0.4 points of 100 from 1862 (SparseVLM v1)", False),
        ("mme", 1840.0, "WARNING: mme unpruned: 1840", True),
        ("textvqa", 0.50, "WARNING", True),
    ],
)
def test_by_how_much_it_differs(task, value, text, loud):
    found = compare(*run(task, value))
    assert text in str(found) and found.loud is loud and str(found).startswith("WARNING") is loud


def test_numbers_are_those_of_the_file():
    with PUBLISHED.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["paper"] == "SparseVLM" and r["method"] == "none"]
    wanted = {r["version"]: float(r["value"]) for r in rows if (r["benchmark"], r["metric"]) == ("scienceqa", "score")}
    assert {e.split()[1]: v for e, v in compare(*run("scienceqa", 0.6)).published.items()} == wanted


@pytest.mark.parametrize(("limit", "editions"), [(1000, ["SparseVLM v4"]), (None, ["SparseVLM v1"]), (999, None)])
def test_an_edition_is_compared_on_its_own_questions(limit, editions):
    judged = {"metric": "gpt_accuracy", "judge": {"model": "gpt-3.5-turbo"}}
    found = compare(*run("msvd", 0.7, "video_llava_7b", limit=limit, benchmark=judged))
    assert (found and list(found.published)) == editions


@pytest.mark.parametrize(
    "changes", [{"method": "sparsevlm"}, {"model": "mini"}, {"model": "llava_1_5_13b"}, {"excluded": 1}]
)
def test_what_is_none_of_the_papers_unpruned_runs(changes):
    metrics, config = run()
    assert compare({**metrics, **changes}, config) is None


@pytest.mark.parametrize(
    ("group", "other"),
    [("model", {"prompt": "hub"}), ("model", {"image_aspect_ratio": "crop"}), ("model", {"dtype": "float32"})],
)
def test_other_settings_are_not_compared(group, other):
    metrics, config = run()
    assert compare(metrics, {**config, group: {**config[group], **other}}) is None
    assert (
        compare(metrics, {**config, "limit": 100}) is None and compare(metrics, {**config, "max_new_tokens": 4}) is None
    )
    metrics, config = run("textvqa", 0.58)
    assert compare(metrics, {**config, "task": {**config["task"], "ocr": False}}) is None


def test_other_questions_or_metrics_are_never_compared():
    for name in ("mmbench", "pope"):
        assert compare(*run(name, 60.0)).published == {} and not compare(*run(name, 60.0)).loud
    assert "not compared" in (text := str(compare(*run("vqav2", 0.76)))) and "test server" in text
    found = compare(*run("mmvet", 0.2, metric="exact_match", not_scored={"gpt_eval_score": "died"}))
    assert found.published == {} and "gpt_eval_score was not judged" in str(found) and not found.loud


def test_another_judges_numbers_are_never_compared():
    judge = {"metric": "gpt_eval_score", "judge": {"model": "gpt-4o", "url": "u"}}
    found = compare(*run("mmvet", 0.2, metric="gpt_eval_score", benchmark=judge))
    assert found.published == {} and "gpt-4o judged, the published number is by gpt-4-0613" in str(found)
    judge["judge"]["model"] = "gpt-4-0613"
    assert compare(*run("mmvet", 0.2, metric="gpt_eval_score", benchmark=judge)).loud


def test_every_table_has_its_settings():
    from eval.runs.against import TABLES

    assert all((CONFIGS / "experiment" / f"{model}_paper.yaml").is_file() for model in TABLES)


def test_it_is_said_after_the_run_and_loudly_on_the_error_stream(tmp_path, capfd):
    import json

    import yaml

    from eval.runs.writer import RunFolder

    metrics, config = run(value=0.58)
    folder = RunFolder(tmp_path, "x")
    folder.path.mkdir(parents=True)
    (folder.path / "metrics.json").write_text(json.dumps(metrics))
    (folder.path / "config.yaml").write_text(yaml.safe_dump(config))
    series._Series(series.Processes(), "").compared(folder)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("WARNING: gqa unpruned: 58, -3.9 points")
    metrics["metrics"]["exact_match"]["value"] = 0.62
    (folder.path / "metrics.json").write_text(json.dumps(metrics))
    series._Series(series.Processes(), "").compared(folder)
    assert capfd.readouterr().out.startswith("gqa unpruned: 62, +0.1 points from 61.9")
