"""Prefill against its floor, and where pruning spends its time, from latency runs.

Writes `latency__<shape>__<prompt>__b<batch>.png` and `.pdf` to `<results>/figures/`, one per run whose settings have
parts. Left: the unpruned and the pruned prefill, with a mark where the floor is. Right: the same settings' parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from eval.runs.reader import LATENCY, Run
from scripts.figures import style
from scripts.tables.latency import conditions, name_of, part_names


def plot_runs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw a figure per latency run; return the files' paths, none if nothing was measured."""
    timed = [run for run in runs if run.task == LATENCY and any(row.get("parts_ms") for row in run.metrics["rows"])]
    names = [_name(run) for run in timed]
    paths = []
    for run, name in zip(timed, names, strict=True):
        if names.count(name) > 1:
            name += f"__{run.metrics['config_hash']}"
        paths += style.save(draw(run), folder, name)
    return paths


def _name(run: Run) -> str:
    row = run.metrics["rows"][0]
    prompt = run.config.get("prompt", f"t{row['text_tokens']}").replace("+", "-")
    return f"latency__{run.model}__{prompt}__b{row['batch_size']}"


@style.styled()
def draw(run: Run) -> Figure:
    """Figure of one run: prefill and floor at the left, parts at the right."""
    rows = [row for row in run.metrics["rows"] if "prefill_ms" in row]
    fig, (left, right) = style.figure(0.9 + 0.22 * len(rows), 2 * style.COLUMN_INCHES, 1, 2)
    places = range(len(rows), 0, -1)
    labels = [
        method + ("" if budget in ("explicit", "full") else f", {budget}") for method, budget in map(name_of, rows)
    ]
    medians = [row["prefill_ms"]["median"] for row in rows]
    spread = [
        [row["prefill_ms"]["median"] - row["prefill_ms"]["q25"] for row in rows],
        [row["prefill_ms"]["q75"] - row["prefill_ms"]["median"] for row in rows],
    ]
    left.barh(places, medians, 0.6, xerr=spread, color="#bbbbbb", error_kw={"elinewidth": 0.8, "capsize": 1.5})
    floors = [(row["floor_ms"]["median"], y) for row, y in zip(rows, places, strict=True) if row.get("floor_ms")]
    if floors:
        left.plot(*zip(*floors, strict=True), "|", color="black", markersize=11, markeredgewidth=1.6, label="floor")
    left.set_yticks(places, labels)
    left.set_xlabel("prefill, ms")
    names = part_names(rows)
    looks = style.looks(names)
    start = [0.0] * len(rows)
    for name in names:
        widths = [row["parts_ms"].get(name, {"median": 0.0})["median"] for row in rows]
        right.barh(places, widths, 0.6, left=start, color=looks[name]["color"], label=name, edgecolor="white", lw=0.3)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set_yticks(places, [])
    right.set_xlabel("of it pruning, ms")
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
    fig.suptitle(f"{run.model}: {conditions(run)}", fontsize=8)
    fig.legend(frameon=False, loc="outside lower center", ncols=len(names) + 1)
    return fig
