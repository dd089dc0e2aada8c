"""The tables of counted multiply-adds show the rows of the runs, beside the paper's numbers."""

import re

import pytest

from eval.runs.reader import read_runs
from scripts.published import look_up
from scripts.tables import flops
from tests.scripts import folders
from tests.scripts.tables.test_tables import ROOT


def count(method, budget, prefill, length=118, first=200.0, own=1.0, **options):
    gmacs = {"llm_prefill": prefill - own, "method": own, "vision": 190.96, "projector": 12.08, "decode": 6.79}
    return {
        "method": method, "budget": budget, "options": options, "text_tokens": length, "entering": 200.0,
        "leaving": 192.0, "gmacs": gmacs, "formula_gmacs": prefill - 2, "prefill_gmacs": prefill,
        "first_token_gmacs": prefill + first,
    }  # fmt: skip


def run(results, rows, digest="a", model="llava_1_5_7b", date="2026-01-01T00:00:00+00:00"):
    about = {"schema": 1, "task": "flops", "model": model, "config_hash": digest, "n": len(rows), **folders.ABOUT}
    name = f"flops__{model}__{digest}"
    folders.write(results / "runs" / name, {}, {**about, "date": date, "rows": rows}, [])
    return name


ROWS = [
    count("none", "full", 4000.0, own=0.0),
    count("sparsevlm", 192, 2000.0),
    count("sparsevlm", 192, 2100.0, early_drop=False),
]


def tables(results):
    return {table.name: table for table in flops.flops_tables(read_runs(results))}


def test_a_table_shows_every_setting_with_what_it_saves(tmp_path):
    name = run(tmp_path, ROWS)
    table = tables(tmp_path)["flops__llava_1_5_7b__t118"]
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.texts]
    assert [(c["method"], c["budget"]) for c in cells] == [
        ("none", "full"), ("sparsevlm", "192"), ("sparsevlm (early_drop=False)", "192"),
    ]  # fmt: skip
    assert (cells[1]["prefill GMAC"], cells[1]["GFLOP"], cells[1]["saved %"]) == ("2,000.00", "4,000.00", "50.0")
    assert cells[1]["of it saved %"] == f"{100 * (1 - 2200 / 4200):.1f}" and cells[2]["saved %"] == "47.5"
    assert cells[1]["of it method GMAC"] == "1.000" and "118 other tokens" in table.caption
    assert all(part.runs == (name,) for row in table.rows for part, *_ in row)


def test_the_newest_count_is_shown_and_another_way_of_booking_is_not(tmp_path):
    old = run(tmp_path, ROWS, "old")
    new = run(tmp_path, [count("sparsevlm", 192, 1000.0)], "new", date="2026-02-01T00:00:00+00:00")
    run(
        tmp_path, [{**count("none", "full", 1.0), "gmacs": {"llm_prefill": 1.0}}], "x", date="2027-01-01T00:00:00+00:00"
    )
    rows = tables(tmp_path)["flops__llava_1_5_7b__t118"].rows
    assert [row[4][0].text for row in rows] == ["4,000.00", "1,000.00", "2,100.00"]
    assert [row[4][0].runs[0] for row in rows] == [old, new, old]


def test_the_papers_column_and_claims_stand_beside_the_counts(tmp_path):
    run(tmp_path, [*ROWS, count("none", "full", 3000.0, 70), count("sparsevlm", 128, 1500.0, 70)])
    run(tmp_path, [count("none", "full", 1.0)], model="llava_1_5_13b")
    found = tables(tmp_path)
    column = {row[0] + row[1]: row for row in found["flops_paper"].texts}
    assert column["nonefull"][2:] == ["4.62", "3.998", "4.000", "4.000"]
    assert column["sparsevlm192"][2:] == ["2.14", "2.098", "2.100", "2.000"] and set(column) == {
        "nonefull", "sparsevlm192",
    }  # fmt: skip
    claims = {row[2]: row[3:] for row in found["flops_claims"].texts}
    assert claims["the same at 70 text tokens"] == [f"{100 * (1 - 1498 / 2998):.1f}", "50.0", "50.0"]
    assert len(claims) == 2
    assert "flops_paper" not in {
        t.name for t in flops.flops_tables([r for r in read_runs(tmp_path) if "13b" in r.model])
    }


def test_claims_are_printed_numbers():
    for version, table, metric, budget, _, _ in flops._CLAIMS:
        assert len(look_up("SparseVLM", version, table, metric=metric, tokens=budget)) == 1
    printed = look_up("SparseVLM", "v4", "Table 1", model=flops.MODEL, benchmark="efficiency", metric="flops")
    ours = {(line.method, line.tokens): line.number for line in printed.itertuples()}
    assert [ours["sparsevlm", str(budget)] for budget in (192, 128, 64)] == [2.14, 1.72, 1.30]
    assert [number for (method, _), number in ours.items() if method == "none"] == [4.62]


def test_the_page_on_costs_has_the_papers_column():
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- flops -->\n(.*?)<!-- end -->", page, re.DOTALL)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines()]
    assert rows[0] == ["method", "budget", "paper", "the paper's formula", "counted, plain", "counted"]
    assert [row[:3] for row in rows[2:]] == [
        ["none", "full", "4.62"], ["sparsevlm", "192", "2.14"],
        ["sparsevlm", "128", "1.72"], ["sparsevlm", "64", "1.30"],
    ]  # fmt: skip
    for row in rows[2:]:
        assert float(row[3]) == pytest.approx(float(row[2]), rel=0.02)
