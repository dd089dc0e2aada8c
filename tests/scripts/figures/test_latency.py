"""The latency figure shows the numbers of latency.json."""

import json

import pytest

from scripts import make_figures
from scripts.figures.latency import draw, plot

ONLY = ["--only", "latency"]


def spread(value):
    return {"median": value, "q25": 0.9 * value, "q75": 1.2 * value}


def row(method, budget, prefill, floor=None, parts=None, batch=1, **more):
    group = {"shape": "llama-64x4", "prompt": "5+40+15", "batch_size": batch, "dtype": "float32", "attention": "sdpa"}
    group |= {"device": "cpu", "threads": 2, "decode_tokens": 1, "method": method, "budget": budget, "options": {}}
    times = {"prefill_ms": spread(prefill), "floor_ms": floor and spread(floor)}
    return group | times | {"parts_ms": {k: spread(v) for k, v in (parts or {}).items()}} | more


ROWS = [
    row("none", "full", 50.0),
    row("sparsevlm", 16, 22.0, 20.0, {"scores": 1.5, "masks": 0.5, "recycling": 0.25}),
    row("fastv", 16, 21.0, 20.5, {"scores": 0.75}),
]


def results(tmp_path, rows, schema=1):
    (tmp_path / "latency").mkdir(parents=True, exist_ok=True)
    content = {"schema": schema, "machine": {}, "rows": rows}
    (tmp_path / "latency" / "latency.json").write_text(json.dumps(content))
    return tmp_path


def test_bars_are_prefills_marks_are_floors_and_parts_are_stacked():
    left, right = draw(ROWS).axes
    assert [bar.get_width() for bar in left.patches] == [50.0, 22.0, 21.0]
    (floors,) = [line for line in left.lines if line.get_label() == "floor"]
    assert list(floors.get_xdata()) == [20.0, 20.5]
    assert [t.get_text() for t in left.get_yticklabels()] == ["none", "sparsevlm, 16", "fastv, 16"]
    stacks = {c.get_label(): [(bar.get_x(), bar.get_width()) for bar in c] for c in right.containers}
    assert list(stacks) == ["scores", "recycling", "masks"]  # in the order of the runtime, not of the file
    assert stacks["scores"] == [(0, 0), (0, 1.5), (0, 0.75)]
    assert stacks["recycling"][1] == (1.5, 0.25) and stacks["masks"][1] == (1.75, 0.5)


def test_one_figure_per_group_whatever_failed(tmp_path):
    failed = {**{k: v for k, v in row("dart", 16, 1.0).items() if not k.endswith("_ms")}, "failed": "out of memory"}
    alone = [row("none", "full", 50.0, batch=4)]  # nothing to compare with: no figure
    paths = plot(results(tmp_path, [*ROWS, failed, *[{**r, "batch_size": 2} for r in ROWS], *alone]))
    assert [p.name for p in paths] == [
        f"latency__llama-64x4__5-40-15__b{b}{suffix}" for b in (1, 2) for suffix in (".png", ".pdf")
    ]
    assert all(p.stat().st_size > 1000 for p in paths)


def test_groups_that_differ_otherwise_have_their_own_files(tmp_path):
    paths = plot(results(tmp_path, [*ROWS, *[{**r, "threads": 1} for r in ROWS]]))
    assert {p.stem for p in paths} == {f"latency__llama-64x4__5-40-15__b1__float32__sdpa__{t}" for t in (1, 2)}


def test_nothing_measured_is_nothing_drawn(tmp_path, capsys):
    assert plot(tmp_path) == []
    make_figures.main([*ONLY, "--results", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_a_foreign_file_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="schema is 9"):
        make_figures.main([*ONLY, "--results", str(results(tmp_path, ROWS, schema=9))])
    (tmp_path / "latency" / "latency.json").write_text("{}")
    with pytest.raises(SystemExit, match="schema"):
        make_figures.main([*ONLY, "--results", str(tmp_path)])
