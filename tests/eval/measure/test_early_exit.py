"""Leaving early where a guide is sure: thresholds, AUROC, and what is kept of each question."""

import json

import pytest

from eval.measure import early_exit


def question(i: int, surety: float, guide_right: bool, model_right: bool) -> dict:
    return {"id": i, "surety": surety, "guide_right": guide_right, "model_right": model_right}


def test_above_the_threshold_the_guides_answer_is_taken():
    results = [question(0, 0.9, True, False), question(1, 0.8, False, True), question(2, 0.1, False, True)]
    assert early_exit.leaving(results, 0.95) == {"threshold": 0.95, "share": 0.0, "accuracy": pytest.approx(2 / 3)}
    assert early_exit.leaving(results, 0.85) == {"threshold": 0.85, "share": pytest.approx(1 / 3), "accuracy": 1.0}
    assert early_exit.leaving(results, 0.0)["accuracy"] == pytest.approx(1 / 3)


def test_auroc_counts_pairs():
    results = [question(i, s, right, True) for i, (s, right) in enumerate([(0.9, True), (0.5, False), (0.4, True)])]
    area, low, high = early_exit.auroc(results)
    assert area == 0.5 and low <= area <= high  # one of the two pairs is in order
    assert early_exit.auroc(results[:1]) is None


def test_command(tmp_path, capsys):
    assert early_exit.main(["--guide", "self", "--questions", "9", "--budget", "64", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "self-64.json").read_text())
    assert [r["id"] for r in content["results"]] == list(range(9))
    for result in content["results"]:
        assert result["surety"] == pytest.approx((result["confidence"] + result["consistency"]) / 2)
        assert 0 < result["consistency"] <= 1 and 0 < result["confidence"] <= 1
        assert result["guide_right"] == (result["guide"].replace(" ", "") == result["answer"])
    assert sum(r["guide_right"] for r in content["results"]) >= 7  # the unpruned model
    assert "one or two tokens" in (tmp_path / "self-64.md").read_text()
    assert early_exit.main(["--guide", "nowhere", "--out", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
