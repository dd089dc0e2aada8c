"""The tables of counted multiply-adds: what is in them, and that nothing is overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import sparsevlm
from scripts.published import look_up
from scripts.tables import flops as flops_table
from sparsevlm.budget import explicit_schedule
from sparsevlm.cost import flops
from sparsevlm.cost.flops import prefill_gmacs
from sparsevlm.methods import build

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "results" / "reference" / "flops"
QUICK = "--models llama-64x4 --methods sparsevlm --budgets 64 --text-tokens 12 --jobs 1"


def start(out, text=QUICK):
    flops_table.main([*text.split(), "--out", str(out)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("flops")
    start(out)
    return out


def test_rows_are_the_counts_in_both_forms(made):
    rows = json.loads((made / "flops__t12.json").read_text())["rows"]
    assert [(r["method"], r["budget"], r["options"]) for r in rows] == [
        ("none", "full", {}), ("sparsevlm", 64, {}), ("sparsevlm", 64, {"early_drop": False}),
    ]  # fmt: skip
    early, plain = (
        flops.count("llama-64x4", "sparsevlm", 64, 12, **options) for options in ({}, {"early_drop": False})
    )
    assert (rows[1]["gmacs"], rows[2]["gmacs"]) == (early, plain)
    full = prefill_gmacs(rows[0]["gmacs"])
    assert rows[1]["saved_percent"] == pytest.approx(100 * (1 - prefill_gmacs(early) / full))
    assert rows[1]["saved_percent"] > rows[2]["saved_percent"] > 50
    table = pd.read_csv(made / "flops__t12.csv")
    assert table["prefill_gflops"].tolist() == pytest.approx([2 * prefill_gmacs(r["gmacs"]) for r in rows])
    text = (made / "flops__t12.md").read_text()
    assert "12 other tokens" in text and "1 GMAC = 2 GFLOP" in text
    entering = rows[1]["entering"]
    cells = f"{entering:.1f} | 64.0 | {prefill_gmacs(early):,.2f} | {2 * prefill_gmacs(early):,.2f}"
    assert entering > 64 and f"| sparsevlm | 64 | {cells} |" in text
    assert "| sparsevlm (early_drop=False) | 64 |" in text


def test_equal_files_are_left_and_others_are_never_overwritten(made, capsys):
    before = {p: p.read_bytes() for p in made.iterdir()}
    start(made)
    assert {p: p.read_bytes() for p in made.iterdir()} == before
    with pytest.raises(SystemExit) as stop:
        start(made, QUICK.replace("64", "100"))
    assert stop.value.code == 2 and "move it away or give --out" in capsys.readouterr().err
    assert all(p.read_bytes() == content for p, content in before.items())


def test_an_interrupted_script_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(flops_table, "code_version", lambda: "abc")
    original, calls = flops_table.row, []

    def row(*entry):
        calls.append(entry)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*entry)

    monkeypatch.setattr(flops_table, "row", row)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path)
    assert stop.value.code == 130 and not list(tmp_path.glob("*.json"))
    with open(tmp_path / ".flops__t12.partial", "a") as file:
        file.write('{"code": "abc", "ke')
    start(tmp_path)
    assert len(calls) == 4 and calls[2] == calls[3]  # only what was missing is counted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flops__t12.csv", "flops__t12.json", "flops__t12.md"]
    monkeypatch.setattr(flops_table, "code_version", lambda: "other")
    (tmp_path / ".flops__t12.partial").write_text('{"code": "abc", "key": "x", "row": {}}\n')
    assert flops_table.Counts(tmp_path / ".flops__t12.partial", 1)._rows == {}


def test_every_method_and_budget_is_counted():
    for model, budgets in flops_table.BUDGETS.items():
        names = [m for m in sparsevlm.methods() if m not in flops_table.UNCOUNTED]
        settings = list(flops_table.settings(model, names, budgets))
        for name, budget, options in settings:
            build(name, budget=budget, **{k: v for k, v in options.items() if k != "rank"})
        found = {(name, budget) for name, budget, _ in settings}
        for name in names:
            assert name in ("none", "sparsevlm_rank") or {(name, b) for b in budgets} <= found
        assert ("sparsevlm_rank", None) in found and settings[0] == ("none", "full", {})


def test_rank_forms_meet_the_budgets_they_are_named_for():
    """As the authors count: the mean of what leaves a layer, of 2048 visual tokens."""
    for budget, options in zip((194, 135), flops_table.RANKS["video"], strict=True):
        layers = tuple(options["layers"])
        assert explicit_schedule(2048, 32, layers, (options["rank"],), 0.3, 0.1).leaving == pytest.approx(
            budget, abs=0.7
        )


def test_claims_are_printed_numbers():
    for version, table, metric, budget, _, _ in flops_table.CLAIMS:
        assert len(look_up("SparseVLM", version, table, metric=metric, tokens=budget)) == 1
    printed = {(name, budget): p.number for p, name, budget in flops_table._table_1()}
    ours = [printed["sparsevlm", budget] for budget in (192, 128, 64)]
    assert [printed["none", "full"], *ours] == [4.62, 2.14, 1.72, 1.30]


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    for text, message in (("--models llava-2", "no shapes"), ("--methods sparsvlm", "unknown method")):
        with pytest.raises(SystemExit) as stop:
            start(tmp_path, f"{QUICK} {text}")
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_count_the_same(tmp_path, made):
    command = [sys.executable, "scripts/tables/flops.py", *QUICK.split()[:-1], "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    for name in ("flops__t12.csv", "flops__t12.md"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_the_page_on_costs_quotes_the_reference():
    table = [line for line in (REFERENCE / "flops__t118.md").read_text().splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(page) if "the paper's formula" in line)
    quoted = [line for line in page[start : start + 6]]
    assert all(line in table for line in quoted) and quoted[2].startswith("| none | full | 4.62 |")
    assert [line.split(" | ")[1] for line in quoted[3:]] == ["192", "128", "64"]


@pytest.mark.slow
def test_the_reference_is_what_the_code_counts():
    found = json.loads((REFERENCE / "flops__t118.json").read_text())
    (row,) = [r for r in found["rows"] if (r["method"], r["budget"], r["options"]) == ("sparsevlm", 192, {})
              and r["model"] == "llava-1.5-7b"]  # fmt: skip
    assert row["gmacs"] == pytest.approx(flops.count("llava-1.5-7b", "sparsevlm", 192, 118), rel=1e-5)  # as printed
    assert flops_table.text(found, flops_table.UNCOUNTED) == (REFERENCE / "flops__t118.md").read_text()
