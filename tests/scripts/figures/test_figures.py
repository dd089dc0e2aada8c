"""Figures: what is drawn is what is in the runs, and it looks as it should."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from eval.measure import layers as measure_layers
from eval.runs.reader import accuracy_groups, read_runs
from scripts import make_figures
from scripts.figures import ablations as plot_ablations
from scripts.figures import accuracy as plot_accuracy
from scripts.figures import layers as plot_layers
from scripts.figures import style
from scripts.tables.ablations import ablation
from scripts.tables.summary import summarise
from tests import tiny
from tests.scripts import folders


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    folders.reproduce(results)
    return results


def summary_of(results):
    runs = read_runs(results)
    (group,) = accuracy_groups(runs)
    return summarise(group, runs)


def drawn(fig) -> dict:
    """Points and error bars by label."""
    (ax,) = fig.axes
    found = {}
    for bars in ax.containers:
        line, _, (segments,) = bars
        ends = [(segment[0, 1], segment[1, 1]) for segment in segments.get_segments()]
        found[bars.get_label()] = line.get_xdata(), line.get_ydata(), ends
    return found


@pytest.mark.parametrize("figure", ["accuracy_against_tokens", "accuracy_against_gmacs"])
def test_points_and_intervals_are_those_of_the_runs(results, figure):
    summary = summary_of(results)
    fig = getattr(plot_accuracy, figure)(summary)
    column = "budget" if figure == "accuracy_against_tokens" else "prefill_gmacs"
    points = drawn(fig)
    assert list(points) == ["random", "sparsevlm", "sparsevlm (raters=all)"]
    for label, (x, y, ends) in points.items():
        rows = summary.frame[summary.frame["method"] == label].sort_values(column)
        np.testing.assert_allclose(np.asarray(x, float), rows[column].to_numpy(float), rtol=0.06)  # set side by side
        np.testing.assert_allclose(np.asarray(y, float), rows["value"])
        np.testing.assert_allclose(ends, rows[["low", "high"]])
    (ax,) = fig.axes
    full = summary.frame.iloc[0]
    (band,) = [p for p in ax.patches if p.get_alpha() is not None]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((full["low"], full["high"]))
    assert "mini" in ax.get_title() and "200 questions" in ax.get_title()


def test_budgets_are_the_ticks_of_a_logarithmic_axis(results):
    (ax,) = plot_accuracy.accuracy_against_tokens(summary_of(results)).axes
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["64", "128", "192"]


def test_files_are_column_wide_and_reproducible(results):
    make_figures.main(["--results", str(results), "--only", "accuracy"])
    names = sorted(path.name for path in (results / "figures").iterdir())
    stems = ["accuracy__minivqa__mini__n200__seed0", "accuracy_gmacs__minivqa__mini__n200__seed0"]
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf"))
    before = [(results / "figures" / name).read_bytes() for name in names]
    assert Image.open(results / "figures" / names[1]).width == round(3.4 * 300)
    make_figures.main(["--results", str(results), "--only", "accuracy"])
    assert [(results / "figures" / name).read_bytes() for name in names] == before


def test_texts_stay_inside_the_figure_and_apart(results):
    """Nothing is cut off at column width, and the legend covers no axis label."""
    fig = plot_accuracy.accuracy_against_tokens(summary_of(results))
    FigureCanvasAgg(fig).draw()
    (ax,), (legend,) = fig.axes, fig.legends
    frame = fig.bbox
    boxes = [text.get_window_extent() for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    boxes.append(legend.get_window_extent())
    for box in boxes:
        assert box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1
        assert box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_unpruned_alone_gives_no_figure(tmp_path):
    folders.accuracy_run(tmp_path)
    assert make_figures.make_figures(tmp_path, ["accuracy"]) == []


def test_a_broken_run_ends_the_script_with_its_name(tmp_path):
    broken = folders.accuracy_run(tmp_path, "random", 64)
    (broken / "metrics.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        make_figures.main(["--results", str(tmp_path)])
    assert str(broken) in str(stop.value.code) and not (tmp_path / "figures").exists()


def test_a_method_looks_the_same_in_every_figure():
    alone = style.looks(["fastv"])["fastv"]
    assert style.looks(["random", "unknown", "fastv", "sparsevlm"])["fastv"] == alone


def test_lines_differ_in_colour_marker_and_stroke():
    labels = ["sparsevlm", "random", "new one", "another", "fastv", "third", "tome"]
    found = style.looks(labels)
    assert list(found) == ["sparsevlm", "random", "fastv", "tome", "new one", "another", "third"]
    for a, b in combinations(found.values(), 2):
        assert a["color"] != b["color"] and a["marker"] != b["marker"] and a["linestyle"] != b["linestyle"]
    assert all(np.mean(to_rgb(look["color"])) < 0.75 for look in found.values())  # visible on white
    assert len(style.looks([f"m{i}" for i in range(20)])) == 20


def test_time_is_drawn_with_its_quartiles_where_it_was_measured(tmp_path):
    folders.reproduce(tmp_path, 20)
    timed = [("none", "full", {}), ("random", 192, {}), ("sparsevlm", 64, {})]
    folders.latency_run(tmp_path, timed)
    fig = plot_accuracy.accuracy_against_latency(summary_of(tmp_path))
    (ax,) = fig.axes
    points = {bars.get_label(): bars for bars in ax.containers}
    assert {label for label, bars in points.items() if len(bars[0].get_xdata())} == {"random", "sparsevlm"}
    assert list(points["random"][0].get_xdata()) == [90.0] and list(points["sparsevlm"][0].get_xdata()) == [80.0]
    across = points["random"][2][0].get_segments()[0]
    assert list(across[:, 0]) == [89.0, 91.0]
    names = {path.stem.split("__")[0] for path in make_figures.make_figures(tmp_path, ["accuracy"])}
    assert names == {"accuracy", "accuracy_gmacs", "accuracy_latency"}


def test_many_methods_get_panels_in_which_no_two_look_alike(tmp_path):
    names = (
        "random sparsevlm sparsevlm_plus fastv pyramiddrop dart ficoco_l random_layer visionzip divprune fastervlm "
        "vispruner aim tome folder ficoco_v downsample"
    ).split()
    folders.accuracy_run(tmp_path)
    for name in names:
        folders.accuracy_run(tmp_path, name, 64)
    fig = plot_accuracy.accuracy_against_tokens(summary_of(tmp_path))
    assert len(fig.axes) == 4
    drawn = []
    for ax in fig.axes:
        labels = [bars.get_label() for bars in ax.containers]
        assert labels[0] == "random" and 1 < len(labels) <= style.MOST_LINES
        assert len({(bars[0].get_color(), bars[0].get_marker()) for bars in ax.containers}) == len(labels)
        drawn += labels[1:]
    assert sorted(drawn) == sorted(set(names) - {"random"})
    [ax] = plot_accuracy.overview(summary_of(tmp_path)).axes  # all in one, a few in colour
    assert [bars.get_label() for bars in ax.containers] == ["divprune", "sparsevlm"]
    grey = [line for line in ax.lines if line.get_color() == "#b5b5b5"]
    assert len(grey) == len(names) - 2 and grey[0].get_label() == f"{len(grey)} other methods"
    written = {path.stem.split("__")[0] for path in make_figures.make_figures(tmp_path, ["accuracy"])}
    assert "accuracy_overview" in written


def test_bars_are_the_runs_and_carry_paired_differences(tmp_path):
    ease = np.random.default_rng(0).random(80)
    folders.accuracy_run(tmp_path, scores=ease < 0.9)
    for budget, digest in ((64, "a"), (128, "b")):
        folders.accuracy_run(tmp_path, "sparsevlm", budget, ease < 0.7, digest=digest)
        folders.accuracy_run(tmp_path, "sparsevlm", budget, ease < 0.4, digest=digest + "0", recycle=0.0)
    (group,) = accuracy_groups(read_runs(tmp_path))
    frame = ablation(group, "recycle")
    (ax,) = plot_ablations.bars(group, frame, "recycling").axes
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in ax.containers if hasattr(c, "patches")}
    expected = {"0.3 (default)": 100 * (ease < 0.7).mean(), "0.0": 100 * (ease < 0.4).mean()}
    assert {k: pytest.approx([v, v]) for k, v in expected.items()} == heights
    change = 100 * ((ease < 0.4).mean() - (ease < 0.7).mean())
    assert [t.get_text() for t in ax.texts] == [f"{change:+.1f}*"] * 2
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "64"]
    stems = {path.stem for path in plot_ablations.plot_runs(read_runs(tmp_path), tmp_path / "figures")}
    assert stems == {"recycling__minivqa__mini__n80__seed0"}


def test_layers_show_means_and_ranges(tmp_path):
    samples = [
        {"question": q, "what": what, "setting": setting, "layer": layer, "value": value + q}
        for q in (0, 2)
        for what, setting, value in (("rank", "paper", 3), ("raters", "paper", 4), ("tokens", "fastv, 64", 100))
        for layer in range(3)
    ]
    rows = measure_layers.summarise_rows(samples)
    assert rows[0] == {"what": "rank", "setting": "paper", "layer": 0, "mean": 4, "smallest": 3, "largest": 5}
    about = {"schema": 1, "task": "layers", "model": "mini", "config_hash": "c", "n": 2, **folders.ABOUT}
    folders.write(tmp_path / "runs" / "layers__mini__c", {}, {**about, "rows": rows}, samples)
    paths = plot_layers.plot_runs(read_runs(tmp_path), tmp_path / "figures")
    assert [path.name for path in paths] == ["layers__mini__n2.png", "layers__mini__n2.pdf"]
    above, below = plot_layers.layers(read_runs(tmp_path)[0]).axes
    assert list(above.lines[0].get_ydata()) == [4, 4, 4] and list(below.lines[0].get_ydata()) == [101] * 3
    assert "5.0 raters" in [t.get_text() for t in above.texts]


def test_ranks_are_those_of_the_attention_and_nothing_is_dropped():
    """On a tiny random model: each layer's rank from its own attention maps."""
    model = tiny.llava()
    inputs, _ = tiny.inputs("one", model)
    n = model.config.get_text_config().num_hidden_layers
    method = measure_layers.Ranks(raters="all", layers=range(n - 1))
    record = measure_layers._prefill(model, inputs, method)
    assert [layer for layer, _, _ in method.seen] == list(range(n - 1))
    assert record.leaving == [record.n_visual[0]] and all(s.tokens_in == s.tokens_out for s in record.stages)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == tiny.IMAGE
    last = int(visual.nonzero()[-1])
    for layer, rank, raters in method.seen:
        p = maps[layer][0].mean(0)[last + 1 :][:, visual]
        assert raters == len(p) and rank == int(torch.linalg.matrix_rank(p))
