"""Bars of the ablations: recycling, raters, layers, from run folders.

Writes `<ablation>__<task>__<model>__n<questions>__seed<seed>.png` and `.pdf` to `<results>/figures/` for what was
varied (`experiment=ablation_recycling`, `ablation_raters`, `ablation_layers`), and nothing for what was not. Bars are
95 % intervals; the number over a bar is its difference to the default in points, * where its paired interval does not
contain 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from eval.runs.reader import Group, Run, accuracy_groups
from scripts.figures import style
from scripts.tables.ablations import OPTIONS, ablation
from scripts.tables.separation import SIGNIFICANT
from scripts.tables.summary import UNPRUNED, metric_of, shown

_HATCHES = ["", "///", "...", "xxx", "\\\\\\", "ooo"]


def plot_runs(runs: Sequence[Run], folder: Path, metric: str | None = None) -> list[Path]:
    """A figure for each option that was varied in a group of runs; returns the files' paths."""
    paths = []
    for group in accuracy_groups(runs):
        for option, (what, _) in OPTIONS.items():
            frame = ablation(group, option, metric)
            if len(frame):
                paths += style.save(bars(group, frame, what, metric), folder, f"{what}__{group.name}")
    return paths


@style.styled()
def bars(group: Group, frame: pd.DataFrame, what: str, metric: str | None = None) -> Figure:
    """One cluster of bars per method and budget, one bar per value of the option."""
    metric, percent = metric_of(group, metric)
    group = group.scored(metric)
    settings = list(dict.fromkeys(frame["setting"]))
    clusters = list(dict.fromkeys(zip(frame["method"], frame["budget"], strict=True)))
    methods = {method for method, _ in clusters}
    looks = style.looks(settings)
    width, crowded = 0.8 / len(settings), len(settings) > 5
    fig, ax = style.figure(2.6, max(style.COLUMN_INCHES, min(style.PAGE_INCHES, 0.28 * len(frame) + 0.8)))
    for i, setting in enumerate(settings):
        rows = frame[frame["setting"] == setting]
        x = [clusters.index(c) + (i - (len(settings) - 1) / 2) * width
             for c in zip(rows["method"], rows["budget"], strict=True)]  # fmt: skip
        errors = [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]
        ax.bar(
            x, rows["value"], width, yerr=errors, color=looks[setting]["color"], alpha=0.75, label=setting,
            edgecolor="white", hatch=_HATCHES[i % len(_HATCHES)], error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip
        for at, row in zip(x, rows.to_dict("records"), strict=True):
            if not row["is_default"]:
                sure = SIGNIFICANT if row["difference_low"] > 0 or row["difference_high"] < 0 else ""
                top = row["value"] if pd.isna(row["high"]) else row["high"]
                ax.annotate(f"{row['difference']:+.1f}{sure}", (at, top), (0, 2), textcoords="offset points",
                            ha="center", fontsize=5.5, rotation=90 if crowded else 0)  # fmt: skip
    full = next((r for r in group.runs if r.metrics["method"] == UNPRUNED), None)
    if full is not None:
        ax.axhline((100 if percent else 1) * full.metrics["metrics"][metric]["value"], lw=0.8, **style.UNPRUNED)
    named = [f"{m}\n{b}" if len(methods) > 1 else str(b) for m, b in clusters]
    ax.set_xticks(range(len(clusters)), named)
    ax.set_xlabel("mean visual tokens per layer" + ("" if len(methods) > 1 else f" ({next(iter(methods))})"))
    ax.set_ylabel(f"{shown(metric)}{' (%)' if percent else ''}")
    ax.grid(axis="x", visible=False)
    ax.set_axisbelow(True)
    ax.set_title(f"{what}: {group.task}, model {group.model}, {group.n} questions")
    ax.margins(y=0.25 if crowded else 0.12)
    fig.legend(frameon=False, loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)
    return fig
