"""Accuracy against visual tokens, and against multiply-adds, from run folders.

    python scripts/plot_accuracy.py --results results

Writes PNG and PDF to `<results>/figures/`, two figures per task, model and set of questions: `accuracy__<name>` over
the budget and `accuracy_gmacs__<name>` over the GMACs of the prefill. One line per method;
bars and band are 95 % intervals.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from scripts import style
from scripts.runs import BadRun, accuracy_groups, read_runs, unfinished
from scripts.summary import UNPRUNED, Summary, summarise


def main(argv: list[str] | None = None) -> None:
    """Draw all figures; exit status 1 and one line on stderr if a run cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--metric", help="which metric of the runs (default: accuracy, or else their first)")
    args = parser.parse_args(argv)
    try:
        written = plot(args.results, args.metric)
    except (BadRun, ValueError, OSError) as error:
        sys.exit(f"plot_accuracy: {error}")
    for folder in unfinished(args.results):
        print(f"left out, not finished: {folder} (the same command again finishes it)", file=sys.stderr)
    for path in written:
        print(path)


def plot(results: Path, metric: str | None = None) -> list[Path]:
    """Draw the figures of all groups of runs under `results`; returns the files' paths.

    Raises:
        BadRun: a run folder cannot be used; nothing is written then.
        ValueError: runs without the metric asked for.
    """
    runs = read_runs(results)
    summaries = [summarise(group, runs, metric) for group in accuracy_groups(runs)]
    paths = []
    for summary in summaries:
        folder, name = results / "figures", summary.group.name
        if summary.frame["budget"].map(lambda b: isinstance(b, int)).any():
            paths += style.save(accuracy_against_tokens(summary), folder, f"accuracy__{name}")
        if (summary.frame["method"].ne(UNPRUNED) & summary.frame["prefill_gmacs"].notna()).any():
            paths += style.save(accuracy_against_gmacs(summary), folder, f"accuracy_gmacs__{name}")
    return paths


@style.styled()
def accuracy_against_tokens(summary: Summary):
    """Figure: one line per method over its budgets (log2 axis, few tokens at the left), unpruned as a band."""
    fig, ax = style.figure(2.5)
    frame = summary.frame
    budgeted = frame[frame["budget"].map(lambda b: isinstance(b, int))]
    budgets = sorted(set(budgeted["budget"]))
    _lines(ax, budgeted, "budget", spread=2**0.05)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(budgets))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(b) for b in budgets])
    total = summary.group.runs[0].metrics["tokens"]["visual"]
    ax.set_xlabel(f"mean visual tokens per layer (unpruned: {total:g})")
    _finish(ax, summary)
    return fig


@style.styled()
def accuracy_against_gmacs(summary: Summary):
    """Figure: one line per method over the GMACs of its prefill, the unpruned model as a band and a point."""
    fig, ax = style.figure(2.5)
    frame = summary.frame.dropna(subset=["prefill_gmacs"])
    _lines(ax, frame[frame["method"] != UNPRUNED], "prefill_gmacs")
    full = frame[frame["method"] == UNPRUNED]
    ax.plot(full["prefill_gmacs"], full["value"], marker="*", markersize=7, color=style.UNPRUNED["color"], linestyle="")
    ax.set_xlabel("LLM prefill, GMACs (1 GMAC = 2 GFLOP)")
    ax.set_xlim(left=0)
    _finish(ax, summary)
    return fig


def _lines(ax: Axes, frame: pd.DataFrame, x: str, spread: float = 1.0) -> None:
    """One line with error bars per method; `spread` sets them side by side (a factor, for a logarithmic axis)."""
    labels = list(dict.fromkeys(frame["method"]))
    looks = style.looks(labels)
    for i, label in enumerate(labels):
        rows = frame[(frame["method"] == label) & frame["value"].notna()].sort_values(x)
        shift = spread ** (i - (len(labels) - 1) / 2)
        errors = [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]
        ax.errorbar(
            rows[x].astype(float) * shift, rows["value"], yerr=errors, capsize=1.5, elinewidth=0.8, **looks[label]
        )


def _finish(ax: Axes, summary: Summary) -> None:
    full = summary.frame[(summary.frame["method"] == UNPRUNED) & summary.frame["value"].notna()]
    if len(full):
        row = full.iloc[0]
        ax.axhline(row["value"], linewidth=0.8, zorder=1, **style.UNPRUNED)
        if pd.notna(row["low"]):
            ax.axhspan(row["low"], row["high"], color=style.UNPRUNED["color"], alpha=0.13, linewidth=0, zorder=0)
    group = summary.group
    ax.set_ylabel(f"{summary.metric}{' (%)' if summary.percent else ''}")
    ax.set_title(f"{group.task}, model {group.model}, {group.n} questions")
    ax.figure.legend(frameon=False, loc="outside lower center", ncols=2, handlelength=3.5, columnspacing=1.5)


if __name__ == "__main__":
    main()
