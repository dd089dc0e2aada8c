"""One method against the others: differences are those of the answers, question by question."""

import numpy as np

from eval.runs.stats import paired_difference
from scripts import compare
from tests.scripts import folders


def test_differences_are_paired_and_budgets_are_equal(tmp_path, capsys):
    right = {name: np.random.default_rng(i).random(80) < share for i, (name, share) in enumerate(SHARES.items())}
    for name, scores in right.items():
        for budget in (192, 64) if name != "dart" else (192,):
            folders.accuracy_run(tmp_path, name, budget, scores=scores.astype(float))
    folders.accuracy_run(tmp_path, "none", "full", scores=np.ones(80))
    assert compare.main(["fastv", "--results", str(tmp_path)]) == 0
    table = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:] if line]
    lines = {cells[1].strip(): cells[2:4] for cells in table}
    assert list(lines)[2:] == ["**fastv**", "dart", "random"] and lines["dart"][1].strip() == "not run"
    ours, theirs = (dict(enumerate(right[name].astype(float))) for name in ("fastv", "random"))
    mean, low, high = paired_difference(ours, theirs)
    shown = lines["random"][0].strip()
    assert shown.startswith(f"{100 * mean:+.1f} [") and shown.endswith("*") == (low > 0 or high < 0)
    assert len(list(tmp_path.glob("compare__fastv__*.md"))) == 1


SHARES = {"fastv": 0.9, "random": 0.2, "dart": 0.88}


def test_a_method_without_runs_is_one_line(tmp_path, capsys):
    folders.accuracy_run(tmp_path, "random", 64)
    assert compare.main(["fastv", "--results", str(tmp_path)]) == 2
    assert "no runs of 'fastv'" in capsys.readouterr().err
