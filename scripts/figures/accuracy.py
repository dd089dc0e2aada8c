"""Accuracy against visual tokens, against multiply-adds and against time, from run folders.

Writes PNG and PDF to `<results>/figures/`, up to four figures per task, model and set of questions:
`accuracy__<name>` over the budget, `accuracy_gmacs__<name>` over the GMACs of the prefill and, where a latency run
covers the settings, `accuracy_latency__<name>` over its time. One line per method, in panels if they are many, and then
`accuracy_overview__<name>`, too: all methods in one panel, a few of them in colour. Bars and band are 95 % intervals,
bars of time quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from eval.runs.reader import Run, accuracy_groups
from scripts.figures import style
from scripts.tables.summary import UNPRUNED, Summary, shown, summarise
from sparsevlm.methods import method_class
from sparsevlm.methods._blocks import BlockMethod
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.methods.downsample import Downsample
from sparsevlm.methods.sparsevlm import SparseVLM


def plot_runs(runs: Sequence[Run], folder: Path, metric: str | None = None) -> list[Path]:
    """Draw the figures of all groups of runs; returns the files' paths.

    Raises:
        ValueError: runs without the metric asked for.
    """
    summaries = [summarise(group, runs, metric) for group in accuracy_groups(runs)]
    paths = []
    for summary in summaries:
        pruned = summary.frame[summary.frame["method"] != UNPRUNED]
        figures = FIGURES if pruned["method"].nunique() <= style.MOST_LINES else (*FIGURES, OVERVIEW)
        for figure, x, name in figures:
            points = pruned[pruned["value"].notna() & pruned[x].notna()]
            if x == "budget":
                points = points[points["budget"].map(lambda b: isinstance(b, int))]
            if len(points):
                paths += style.save(figure(summary), folder, f"{name}__{summary.group.name}")
    return paths


@style.styled()
def accuracy_against_tokens(summary: Summary) -> Figure:
    """Figure: one line per method over its budgets (log2 axis, few tokens at the left), unpruned as a band."""
    frame = summary.frame
    budgeted = frame[frame["budget"].map(lambda b: isinstance(b, int))]
    budgets = sorted(set(budgeted["budget"]))
    fig, panels = _panels(list(dict.fromkeys(budgeted["method"])))
    for ax, labels in panels:
        _lines(ax, budgeted, "budget", labels, spread=2**0.05)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(budgets))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([str(b) for b in budgets])
    total = summary.group.runs[0].metrics["tokens"]["visual"]
    return _finish(fig, panels, summary, f"mean visual tokens per layer (unpruned: {total:g})")


@style.styled()
def accuracy_against_gmacs(summary: Summary) -> Figure:
    """Figure: one line per method over the GMACs of its prefill, the unpruned model as a band and a star."""
    return _against(summary, "prefill_gmacs", "prefill with the method's work, GMACs (1 GMAC = 2 GFLOP)")


@style.styled()
def accuracy_against_latency(summary: Summary) -> Figure:
    """Figure: one line per method over the median time of its prefill (bars: quartiles), unpruned band and star."""
    row = summary.latency.metrics["rows"][0]
    text = f"prefill, ms (batch {row['batch_size']}, {row['text_tokens']} text tokens)"
    return _against(summary, "prefill_ms", text)


FIGURES = (
    (accuracy_against_tokens, "budget", "accuracy"),
    (accuracy_against_gmacs, "prefill_gmacs", "accuracy_gmacs"),
    (accuracy_against_latency, "prefill_ms", "accuracy_latency"),
)


@style.styled()
def overview(summary: Summary) -> Figure:
    """Figure: all methods over the GMACs of their prefill, those of `style.HIGHLIGHTED` in colour, the others grey."""
    frame = summary.frame.dropna(subset=["prefill_gmacs", "value"])
    labels = list(dict.fromkeys(frame["method"][frame["method"] != UNPRUNED]))
    bright = [label for label in style.HIGHLIGHTED if label in labels]
    fig, ax = style.figure(2.4 + style.legend_inches(bright), style.PAGE_INCHES / 2 + 1.2)
    for i, label in enumerate(grey := [label for label in labels if label not in bright]):
        rows = frame[frame["method"] == label].sort_values("prefill_gmacs")
        name = f"{len(grey)} other methods" if i == 0 else None
        ax.plot(rows["prefill_gmacs"], rows["value"], color="#b5b5b5", linewidth=0.8, marker=".", label=name, zorder=1)
    _lines(ax, frame, "prefill_gmacs", bright)
    return _finish(fig, [(ax, bright)], summary, "prefill with the method's work, GMACs (1 GMAC = 2 GFLOP)")


OVERVIEW = (overview, "prefill_gmacs", "accuracy_overview")


def _against(summary: Summary, x: str, text: str) -> Figure:
    frame = summary.frame.dropna(subset=[x])
    full = frame[frame["method"] == UNPRUNED]
    fig, panels = _panels(list(dict.fromkeys(frame["method"][frame["method"] != UNPRUNED])))
    for ax, labels in panels:
        _lines(ax, frame, x, labels)
        ax.plot(full[x], full["value"], marker="*", markersize=7, color=style.UNPRUNED["color"], linestyle="")
        ax.set_xlim(left=0)
    return _finish(fig, panels, summary, text)


def _panels(labels: Sequence[str]) -> tuple[Figure, list[tuple[Axes, list[str]]]]:
    """A figure with the lines of each of its panels: one panel, or, for more lines than can be told apart, one per
    family of methods, each with random tokens beside them."""
    if len(labels) <= style.MOST_LINES:
        fig, ax = style.figure(2.0 + style.legend_inches(labels))
        return fig, [(ax, list(labels))]
    families = {name: [label for label in labels if _family(label) == name] for name in _FAMILIES}
    most = style.MOST_LINES - 1
    parts = [(name, found[i : i + most]) for name, found in families.items() for i in range(0, len(found), most)]
    rows = (len(parts) + 1) // 2
    longest = max(style.legend_inches([*found, "random"]) for _, found in parts)
    fig, axes = style.figure((2.1 + longest) * rows, style.PAGE_INCHES, rows, 2)
    for ax in axes.flat[len(parts) :]:
        ax.remove()
    control = [label for label in labels if label == "random"]
    for ax, (name, _) in zip(axes.flat, parts, strict=False):
        ax.set_title(name)
    return fig, [(ax, control + found) for ax, (_, found) in zip(axes.flat, parts, strict=False)]


_FAMILIES = ("SparseVLM", "inside the language model", "before the language model", "in the vision tower, or before it")


def _family(label: str) -> str:
    name = label.split(" ")[0]
    if name == "random":
        return ""  # in every panel
    kind = method_class(name)
    bases = ((SparseVLM, 0), (BlockMethod, 3), (Downsample, 3), (VisionMethod, 2))
    return _FAMILIES[next((place for base, place in bases if issubclass(kind, base)), 1)]


def _lines(ax: Axes, frame: pd.DataFrame, x: str, labels: list[str], spread: float = 1.0) -> None:
    """One line with error bars per method; `spread` sets them side by side (a factor, for a logarithmic axis)."""
    looks = style.looks(labels)
    for i, label in enumerate(labels):
        rows = frame[(frame["method"] == label) & frame["value"].notna()].sort_values(x)
        shift = spread ** (i - (len(labels) - 1) / 2)
        bars = {"yerr": [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]}
        if f"{x}_q25" in rows:
            bars["xerr"] = [rows[x] - rows[f"{x}_q25"], rows[f"{x}_q75"] - rows[x]]
        ax.errorbar(rows[x].astype(float) * shift, rows["value"], **bars, capsize=1.5, elinewidth=0.8, **looks[label])


def _finish(fig: Figure, panels: list[tuple[Axes, list[str]]], summary: Summary, x: str) -> Figure:
    """Band of the unpruned model, labels, legends."""
    full = summary.frame[(summary.frame["method"] == UNPRUNED) & summary.frame["value"].notna()]
    heights = [ax.get_ylim() for ax, _ in panels]
    group, several = summary.group, len(panels) > 1
    for ax, labels in panels:
        if len(full):
            row = full.iloc[0]
            ax.axhline(row["value"], linewidth=0.8, zorder=1, **style.UNPRUNED)
            if pd.notna(row["low"]):
                ax.axhspan(row["low"], row["high"], color=style.UNPRUNED["color"], alpha=0.13, linewidth=0, zorder=0)
        if several:
            ax.set_ylim(min(h[0] for h in heights), max(max(h[1] for h in heights), *full["high"], *full["value"]))
            ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.24), **style.legend_columns(labels))
        ax.set_xlabel(x)
        ax.set_ylabel(f"{shown(summary.metric)}{' (%)' if summary.percent else ''}")
    title = f"{group.task}, model {group.model}, {group.n} questions"
    if several:
        fig.suptitle(title, fontsize=8)
    else:
        panels[0][0].set_title(title)
        fig.legend(frameon=False, loc="outside lower center", **style.legend_columns(panels[0][1]))
    return fig
