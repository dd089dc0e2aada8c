"""Tables from fabricated run folders: numbers, gaps, refusals, formats."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.runs.reader import BadRun, accuracy_groups, label, read_runs
from eval.runs.stats import bootstrap_ci
from scripts import make_tables
from scripts.tables import formats as tables
from scripts.tables.summary import summarise
from tests.scripts import folders

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Results of a whole series and of a latency run that covers a part of it."""
    results = tmp_path_factory.mktemp("results")
    folders.reproduce(results)
    folders.latency_run(results, [("none", "full", {}), ("random", 192, {}), ("sparsevlm", 64, {})])
    return results


def only_summary(results):
    runs = read_runs(results)
    (group,) = accuracy_groups(runs)
    return summarise(group, runs)


def cells(results, name):
    with open(results / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_the_samples(series):
    frame = only_summary(series).frame.set_index(["method", "budget"])
    ease = np.random.default_rng(0).random(200)
    full, pruned = (ease < 0.84).astype(float), (ease < 0.40).astype(float)
    row = frame.loc["random", 64]
    assert row["value"] == pytest.approx(100 * pruned.mean())
    assert row["difference"] == pytest.approx(100 * (pruned - full).mean())
    paired = bootstrap_ci(pruned - full)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((100 * paired[1], 100 * paired[2]))
    assert row["retained"] == pytest.approx(100 * pruned.mean() / full.mean())
    assert row["prefill_gmacs"] == 0.6
    assert frame.loc["none", "full"]["difference"] == 0


def test_the_table_has_a_row_per_method_and_budget_in_order(series):
    make_tables.main(["--results", str(series)])
    rows = cells(series, "minivqa__mini__n200__seed0")
    budgets = ["192", "128", "64"]
    methods = ["random", "sparsevlm", "sparsevlm (raters=all)"]
    expected = [("none", "full"), *((m, b) for m in methods for b in budgets)]
    assert [(r["method"], r["budget"]) for r in rows] == expected


def test_times_are_of_the_same_setting_only(series):
    rows = {(r["method"], r["budget"]): r for r in cells(series, "minivqa__mini__n200__seed0")}
    time, ratio = "prefill ms [quartiles]", "ratio to unpruned [quartiles]"
    assert rows["random", "192"][time] == "90.0 [89.0, 91.0]" and rows["random", "192"][ratio] == "0.90 [0.89, 0.91]"
    assert rows["sparsevlm", "64"][time] == "80.0 [79.0, 81.0]"
    for key in (("random", "64"), ("sparsevlm", "192"), ("sparsevlm (raters=all)", "64")):
        assert rows[key][time] == rows[key][ratio] == "not run"


def test_all_formats_show_the_same_cells(series):
    folder, name = series / "tables", "minivqa__mini__n200__seed0"
    rows = cells(series, name)
    markdown = [line for line in (folder / f"{name}.md").read_text().splitlines() if line.startswith("|")]
    assert markdown[0] == "| " + " | ".join(rows[0]) + " |" and markdown[2:] == [
        "| " + " | ".join(row.values()) + " |" for row in rows
    ]
    latex = (folder / f"{name}.tex").read_text()
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert body == [" & ".join(row.values()) + r" \\" for row in rows]  # no cell of this table needs escaping
    head = latex.split(r"\toprule")[1].split(r"\midrule")[0].strip()
    assert head == " & ".join(rows[0]).replace("%", r"\%") + r" \\"
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2


def test_the_caption_says_what_and_what_not(series):
    text = (series / "tables" / "minivqa__mini__n200__seed0.md").read_text().splitlines()[0]
    for part in ("minivqa", "model mini", "200 questions", "seed 0", "not a 7B", "11 text tokens", "30 interleaved",
                 "latency__mini__beef", "of 576"):  # fmt: skip
        assert part in text
    latency = (series / "tables" / "latency__mini__beef.md").read_text()
    assert (
        "not a 7B" in latency
        and "| sparsevlm | 64 | 200.0 | 180.0 | 80.0 [79.0, 81.0] | 0.80 [0.79, 0.81] |" in latency
    )
    folders.accuracy_run(series.parent / "other", model="llava_1_5_7b")
    assert "not a 7B" not in make_tables.caption(only_summary(series.parent / "other"))


def test_text_is_escaped_for_latex():
    assert tables.escape(r"a_b 5 % & {#} \x ~^$") == (
        r"a\_b 5 \% \& \{\#\} \textbackslash{}x \textasciitilde{}\textasciicircum{}\$"
    )


def test_what_was_not_run_says_so(tmp_path):
    folders.accuracy_run(tmp_path, "random", 192, digest="a")
    folders.accuracy_run(tmp_path, "random", 64, digest="b")
    folders.accuracy_run(tmp_path, "sparsevlm", 64, digest="c", gmacs=None)
    make_tables.make_tables(tmp_path)
    rows = {(r["method"], r["budget"]): list(r.values())[2:] for r in cells(tmp_path, "minivqa__mini__n4__seed0")}
    assert set(rows["none", "full"]) == set(rows["sparsevlm", "192"]) == {"not run"}
    assert rows["random", "64"][3] == "no unpruned run" and rows["random", "64"][4] == "not run"
    assert rows["sparsevlm", "64"][5] == "not counted"
    assert len(rows) == 5


def test_explicit_knobs_have_a_row_of_their_own(tmp_path):
    folders.accuracy_run(tmp_path)
    folders.accuracy_run(tmp_path, "sparsevlm", None, layers=(1, 2), keep=(100, 50))
    folders.accuracy_run(tmp_path, "random", 64)
    frame = only_summary(tmp_path).frame
    assert list(zip(frame["method"], frame["budget"], strict=True)) == [
        ("none", "full"), ("random", 64), ("sparsevlm (layers=1/2, keep=100/50)", "explicit"),
    ]  # fmt: skip


def test_labels_name_options_that_are_not_defaults():
    assert label("sparsevlm", {"raters": "paper", "layers": None}) == "sparsevlm"
    assert label("sparsevlm", {"raters": "all", "recycle": 0.3, "keep": [9, 4]}) == "sparsevlm (raters=all, keep=9/4)"
    assert label("of_another_version", {"x": 1}) == "of_another_version (x=1)"


def test_sets_of_questions_are_never_mixed(tmp_path):
    folders.accuracy_run(tmp_path, digest="a")
    folders.accuracy_run(tmp_path, seed=1, digest="b")
    folders.accuracy_run(tmp_path, scores=[1, 0], digest="c")
    folders.accuracy_run(tmp_path, model="mini_video", digest="d")
    names = [path.stem for path in make_tables.make_tables(tmp_path) if path.stem.startswith("minivqa")]
    assert sorted(names) == sorted(
        ["minivqa__mini__n4__seed0", "minivqa__mini__n4__seed1", "minivqa__mini__n2__seed0",
         "minivqa__mini_video__n4__seed0"]
    )  # fmt: skip
    assert all(len(cells(tmp_path, name)) == 1 for name in names)


def edit(folder, **changes):
    path = folder / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(folder, name):
    path = folder / name
    path.write_text(path.read_text()[:-30])


def repeat_first_sample(folder):
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[:3]]) + "\n")


BREAKS = {
    "a file is missing": (lambda f: (f / "env.json").unlink(), "lacks env.json"),
    "metrics torn": (lambda f: cut(f, "metrics.json"), "Expecting|Unterminated|delimiter"),
    "metrics no mapping": (lambda f: (f / "metrics.json").write_text("[]"), "no mapping"),
    "config no YAML": (lambda f: (f / "config.yaml").write_text("a: [1"), "config|while parsing"),
    "another schema": (lambda f: edit(f, schema=2), "schema is 2"),
    "no schema": (lambda f: edit(f, schema=None), "schema is None"),
    "samples torn": (lambda f: cut(f, "samples.jsonl"), "Expecting|Unterminated|delimiter"),
    "a sample is missing": (lambda f: (f / "samples.jsonl").write_text(""), "4 questions, samples.jsonl has 0"),
    "a sample twice": (repeat_first_sample, "same question twice"),
    "value edited": (
        lambda f: edit(f, metrics={"accuracy": {"value": 0.99, "ci95": [0.9, 1.0], "n": 4}}),
        "accuracy is 0.99, but the mean of its samples 0.75",
    ),
    "a key is missing": (lambda f: edit(f, metrics={"accuracy": {"value": 0.75}}), "ci95"),
    "foreign": (lambda f: (f / "metrics.json").write_text('{"schema": 1}'), "lacks task, model"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_run_is_refused_by_name_and_nothing_is_written(tmp_path, case, capsys):
    folders.accuracy_run(tmp_path)
    broken = folders.accuracy_run(tmp_path, "random", 64, digest="broken")
    change, message = BREAKS[case]
    change(broken)
    with pytest.raises(BadRun, match=message) as error:
        read_runs(tmp_path)
    assert str(broken) in str(error.value)
    with pytest.raises(SystemExit) as stop:
        make_tables.main(["--results", str(tmp_path)])
    assert str(broken) in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert not (tmp_path / "tables").exists()


def test_a_broken_latency_run_is_refused_too(tmp_path):
    broken = folders.latency_run(tmp_path, [("none", "full", {})])
    edit(broken, rows=[{"method": "none"}])
    with pytest.raises(BadRun, match="a row lacks") as error:
        read_runs(tmp_path)
    assert str(broken) in str(error.value)


def test_no_runs_at_all_is_said(tmp_path):
    with pytest.raises(BadRun, match="make reproduce"):
        read_runs(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(BadRun, match="make reproduce"):
        read_runs(tmp_path)


def test_an_unfinished_run_is_named_and_left_out(tmp_path, capsys):
    folders.accuracy_run(tmp_path)
    (tmp_path / "runs" / ".minivqa__mini__random__64__x.partial").mkdir()
    make_tables.main(["--results", str(tmp_path)])
    captured = capsys.readouterr()
    assert ".minivqa__mini__random__64__x.partial" in captured.err
    assert [r["method"] for r in cells(tmp_path, "minivqa__mini__n4__seed0")] == ["none"]


def test_the_same_setting_twice_is_refused(tmp_path):
    folders.accuracy_run(tmp_path, "random", 64, digest="old")
    folders.accuracy_run(tmp_path, "random", 64, digest="new")
    with pytest.raises(BadRun, match="__old and .*|__new and .*"):
        accuracy_groups(read_runs(tmp_path))


def test_other_settings_of_the_model_are_refused(tmp_path):
    folders.accuracy_run(tmp_path)
    other = folders.accuracy_run(tmp_path, "random", 64)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["dtype"] = "bfloat16"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(BadRun, match="different settings of the model"):
        accuracy_groups(read_runs(tmp_path))


def test_other_questions_under_the_same_name_are_refused(tmp_path):
    folders.accuracy_run(tmp_path)
    other = folders.accuracy_run(tmp_path, "random", 64)
    path = other / "samples.jsonl"
    path.write_text(path.read_text().replace('"q2"', '"another question"'))
    with pytest.raises(BadRun, match="different questions") as error:
        accuracy_groups(read_runs(tmp_path))
    assert str(other) in str(error.value)


def test_of_several_latency_runs_the_one_that_covers_most_counts(tmp_path):
    folders.accuracy_run(tmp_path)
    folders.accuracy_run(tmp_path, "random", 64)
    both = [("none", "full", {}), ("random", 64, {})]
    folders.latency_run(tmp_path, both, digest="old", date="2026-01-01T00:00:00+00:00")
    folders.latency_run(tmp_path, both, digest="new", date="2026-02-01T00:00:00+00:00")
    folders.latency_run(tmp_path, both[:1], digest="newest", date="2026-03-01T00:00:00+00:00")
    assert only_summary(tmp_path).latency.folder.name == "latency__mini__new"


def test_an_unknown_metric_lists_the_known(tmp_path):
    folders.accuracy_run(tmp_path)
    with pytest.raises(ValueError, match="no metric 'acuracy'; it has accuracy"):
        make_tables.make_tables(tmp_path, "acuracy")


def test_it_runs_as_a_file_from_anywhere(series, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "make_tables.py"), "--results", str(series)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "minivqa__mini__n200__seed0.md" in done.stdout
