"""Figures: what is drawn is what is in the runs, and it looks as it should."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from scripts import plot_accuracy, style
from scripts.runs import accuracy_groups, read_runs
from scripts.summary import summarise
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
    plot_accuracy.main(["--results", str(results)])
    names = sorted(path.name for path in (results / "figures").iterdir())
    stems = ["accuracy__minivqa__mini__n200__seed0", "accuracy_gmacs__minivqa__mini__n200__seed0"]
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf"))
    before = [(results / "figures" / name).read_bytes() for name in names]
    assert Image.open(results / "figures" / names[1]).width == round(3.4 * 300)
    plot_accuracy.main(["--results", str(results)])
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
    assert plot_accuracy.plot(tmp_path) == []


def test_a_broken_run_ends_the_script_with_its_name(tmp_path):
    broken = folders.accuracy_run(tmp_path, "random", 64)
    (broken / "metrics.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        plot_accuracy.main(["--results", str(tmp_path)])
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
