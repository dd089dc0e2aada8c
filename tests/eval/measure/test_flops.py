"""Counted multiply-adds: what is in the run folders, that nothing is counted twice, and what is refused."""

import json

import pytest

import sparsevlm
from eval.measure import flops as command
from eval.runs import environment
from eval.runs.reader import read_runs
from sparsevlm.budget import explicit_schedule
from sparsevlm.cost import flops
from sparsevlm.cost.flops import first_token_gmacs, prefill_gmacs
from sparsevlm.methods import build

QUICK = "--models llama-64x4 --methods sparsevlm --budgets 64 --text-tokens 12 --jobs 1"


def start(results, text=QUICK):
    command.main([*text.split(), "--results", str(results)])


def test_rows_are_the_counts_in_both_forms(tmp_path, capsys, monkeypatch):
    start(tmp_path)
    (run,) = read_runs(tmp_path)
    rows = run.metrics["rows"]
    assert run.folder.name.startswith("flops__llama_64x4__") and capsys.readouterr().out.strip() == str(run.folder)
    assert [(r["method"], r["budget"], r["options"]) for r in rows] == [
        ("none", "full", {}), ("sparsevlm", 64, {}), ("sparsevlm", 64, {"early_drop": False}),
    ]  # fmt: skip
    for row in rows:
        gmacs = flops.count("llama-64x4", row["method"], row["budget"], 12, **row["options"])
        assert row["gmacs"] == gmacs and row["text_tokens"] == 12
        assert row["prefill_gmacs"] == prefill_gmacs(gmacs) and row["first_token_gmacs"] == first_token_gmacs(gmacs)
    assert rows[0]["prefill_gmacs"] > rows[2]["prefill_gmacs"] > rows[1]["prefill_gmacs"]
    monkeypatch.setattr(command, "row", lambda *_: pytest.fail("counted again"))
    start(tmp_path)
    assert capsys.readouterr().out == f"already there: {run.folder}\n"


@pytest.mark.parametrize("edited", [False, True], ids=["same code", "other code"])
def test_an_interrupted_count_resumes_with_the_rows_of_the_same_code(tmp_path, monkeypatch, capsys, edited):
    original, calls = command.row, []

    def row(*entry):
        calls.append(entry)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*entry)

    monkeypatch.setattr(command, "row", row)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path)
    assert stop.value.code == 130 and "Rerun the same command to resume" in capsys.readouterr().err
    (partial,) = (tmp_path / "runs").iterdir()
    with open(partial / "ledger.jsonl", "a") as file:
        file.write('{"by": [nul')
    if edited:
        monkeypatch.setattr(environment, "git_at_start", lambda: {"commit": "f" * 40, "dirty": False})
    start(tmp_path)
    assert calls[3:] == (calls[:3] if edited else calls[2:3])
    (run,) = read_runs(tmp_path)
    assert [r["gmacs"] for r in run.metrics["rows"]] == [original(*entry)["gmacs"] for entry in calls[:3]]
    assert not (run.folder / "ledger.jsonl").exists()


def test_every_method_and_budget_is_counted():
    for model, budgets in command.BUDGETS.items():
        names = [m for m in sparsevlm.methods() if m not in command.UNCOUNTED]
        settings = list(command.settings(model, names, budgets))
        for name, budget, options in settings:
            build(name, budget=budget, **{k: v for k, v in options.items() if k != "rank"})
        found = {(name, budget) for name, budget, _ in settings}
        for name in names:
            assert name in ("none", "sparsevlm_rank") or {(name, b) for b in budgets} <= found
        assert ("sparsevlm_rank", None) in found and settings[0] == ("none", "full", {})


def test_the_paper_is_counted_at_the_lengths_of_its_abstract():
    entries = command._paper_range(118)
    assert {(entry[3], entry[2]) for entry in entries} == {(n, b) for n in (130, 70) for b in ("full", 128)}
    assert {entry[3] for entry in command._paper_range(70)} == {130}


def test_rank_forms_meet_the_budgets_they_are_named_for():
    """As the authors count: the mean of what leaves a layer, of 2048 visual tokens."""
    for budget, options in zip((194, 135), command.RANKS["video"], strict=True):
        layers = tuple(options["layers"])
        assert explicit_schedule(2048, 32, layers, (options["rank"],), 0.3, 0.1).leaving == pytest.approx(
            budget, abs=0.7
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--models llava-2", "no shapes"),
        ("--methods sparsvlm", "unknown method"),
        ("--budgets 6x", "integers separated by ','"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, f"{QUICK} {text}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 or "count/s" in error


@pytest.mark.slow
def test_processes_count_the_same(tmp_path):
    start(tmp_path / "one")
    start(tmp_path / "two", QUICK.replace("--jobs 1", "--jobs 2"))
    one, two = (json.loads(next((tmp_path / n / "runs").glob("*/metrics.json")).read_text()) for n in ("one", "two"))
    assert one["rows"] == two["rows"]
