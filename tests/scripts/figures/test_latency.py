"""The latency figure shows the numbers of latency runs."""

import pytest

from eval.runs.reader import BadRun, read_runs
from scripts import make_figures
from scripts.figures.latency import draw, plot_runs
from tests.scripts import folders


def spread(value):
    return {"median": value, "q25": 0.9 * value, "q75": 1.2 * value}


def row(method, budget, prefill, floor=None, parts=None, batch=1):
    return {
        "method": method, "budget": budget, "options": {}, "batch_size": batch, "text_tokens": 20,
        "prefill_ms": spread(prefill), "floor_ms": floor and spread(floor), "prefill_ratio": spread(prefill / 50),
        "parts_ms": {k: spread(v) for k, v in (parts or {}).items()},
    }  # fmt: skip


ROWS = [
    row("none", "full", 50.0),
    row("sparsevlm", 16, 22.0, 20.0, {"scores": 1.5, "masks": 0.5, "recycling": 0.25}),
    row("fastv", 16, 21.0, 20.5, {"scores": 0.75}),
]


def run(results, rows=ROWS, digest="a", **config):
    about = {"schema": 1, "task": "latency", "model": "llama-64x4", "config_hash": digest, "n": 5, **folders.ABOUT}
    config = {"prompt": "5+40+15", "dtype": "float32", "attention": "sdpa", "device": "cpu", **config}
    folders.write(results / "runs" / f"latency__llama-64x4__{digest}", config, {**about, "rows": rows}, [])
    return read_runs(results)


def test_bars_are_prefills_marks_are_floors_and_parts_are_stacked(tmp_path):
    left, right = draw(run(tmp_path)[0]).axes
    assert [bar.get_width() for bar in left.patches] == [50.0, 22.0, 21.0]
    (floors,) = [line for line in left.lines if line.get_label() == "floor"]
    assert list(floors.get_xdata()) == [20.0, 20.5]
    assert [t.get_text() for t in left.get_yticklabels()] == ["none", "sparsevlm, 16", "fastv, 16"]
    stacks = {c.get_label(): [(bar.get_x(), bar.get_width()) for bar in c] for c in right.containers}
    assert list(stacks) == ["scores", "recycling", "masks"]  # in the order of the runtime, not of the file
    assert stacks["scores"] == [(0, 0), (0, 1.5), (0, 0.75)]
    assert stacks["recycling"][1] == (1.5, 0.25) and stacks["masks"][1] == (1.75, 0.5)


def test_one_figure_per_run_whatever_failed(tmp_path):
    failed = {
        "method": "dart",
        "budget": 16,
        "options": {},
        "batch_size": 1,
        "text_tokens": 20,
        "failed": "out of memory",
    }
    run(tmp_path, [*ROWS, failed], "a")
    run(tmp_path, [{**r, "batch_size": 2} for r in ROWS], "b")
    runs = run(tmp_path, [row("none", "full", 50.0, batch=4)], "c")  # nothing to compare with: no figure
    paths = plot_runs(runs, tmp_path / "figures")
    assert [p.name for p in paths] == [
        f"latency__llama-64x4__5-40-15__b{b}{suffix}" for b in (1, 2) for suffix in (".png", ".pdf")
    ]
    assert all(p.stat().st_size > 1000 for p in paths)


def test_runs_that_differ_otherwise_have_their_own_files(tmp_path):
    run(tmp_path, digest="a")
    paths = plot_runs(run(tmp_path, digest="b", attention="eager"), tmp_path / "figures")
    assert {p.stem for p in paths} == {f"latency__llama-64x4__5-40-15__b1__{digest}" for digest in "ab"}


def test_nothing_measured_is_nothing_drawn(tmp_path, capsys):
    folders.accuracy_run(tmp_path)
    make_figures.main(["--only", "latency", "--results", str(tmp_path)])
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="no run folders"):
        make_figures.main(["--only", "latency", "--results", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="unknown kind of figure 'times'"):
        make_figures.main(["--only", "times", "--results", str(tmp_path)])


def test_a_run_without_its_times_is_refused(tmp_path):
    with pytest.raises(BadRun, match="a row lacks prefill_ms"):
        run(tmp_path, [{k: v for k, v in row("none", "full", 1.0).items() if k != "prefill_ms"}])
