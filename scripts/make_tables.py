"""All tables (Markdown, CSV, LaTeX), from run folders and published numbers, and from nothing else.

    python scripts/make_tables.py --results results
    python scripts/make_tables.py --results results --only table1_icml,separation
    python scripts/make_tables.py --list

Writes to `<results>/tables/`: the paper's tables, with "not run" where nobody ran it; per task, model and set of
questions one table of accuracy and cost, one of efficiency, one that shows what separates the methods, and one per
ablation; one per latency run and per measurement of half precision. A run folder that is broken ends the script with
its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from eval.runs.reader import HALF_PRECISION, LATENCY, BadRun, Run, accuracy_groups, read_runs, unfinished
from scripts.tables.ablations import ablation_tables, interval
from scripts.tables.costs import (
    efficiency_paper,
    efficiency_table,
    half_precision_table,
    number,
)
from scripts.tables.flops import flops_tables
from scripts.tables.formats import NOT_JUDGED, NOT_RUN, NOTHING, Table, from_frame, write
from scripts.tables.latency import conditions, latency_tables
from scripts.tables.paper import EDITIONS, paper_table
from scripts.tables.rank_ablation import rank_ablation
from scripts.tables.separation import separation_table
from scripts.tables.summary import MATCHED, Summary, embedded, kept_apart, shown, summarise


def main(argv: list[str] | None = None) -> None:
    """Write tables; exit status 1 and one line on stderr if a run cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument(
        "--metric", help="which metric of the runs (default: visual accuracy, accuracy, or their first)"
    )
    parser.add_argument("--only", help="names of tables, or how they begin, separated by commas")
    parser.add_argument("--list", action="store_true", help="name the tables that there would be, and write none")
    args = parser.parse_args(argv)
    try:
        tables = chosen(build_tables(read_runs(args.results), args.metric), args.only)
        written = [table.name if args.list else str(write(table, args.results / "tables")[0]) for table in tables]
    except (BadRun, ValueError, OSError) as error:
        sys.exit(f"make_tables: {error}")
    for folder in unfinished(args.results):
        print(f"left out, not finished: {folder} (the same command again finishes it)", file=sys.stderr)
    print(*written, sep="\n")


def make_tables(results: Path, metric: str | None = None) -> list[Path]:
    """Write the tables of all runs under `results` and return the paths of the Markdown files.

    Raises:
        BadRun: a run folder cannot be used; nothing is written then.
        ValueError: runs without the metric asked for.
    """
    tables = build_tables(read_runs(results), metric)
    return [write(table, results / "tables")[0] for table in tables]


def build_tables(runs: Sequence[Run], metric: str | None = None) -> list[Table]:
    """All tables: the paper's first, then those of each group of runs, then those of the measurements."""
    groups = accuracy_groups(runs)
    tables = [*(paper_table(edition, runs) for edition in EDITIONS), efficiency_paper(runs)]
    tables += ablation_tables(groups, runs, metric)
    tables += [table for group in groups if (table := rank_ablation(group, metric)) is not None]
    for group in groups:
        summary = summarise(group, runs, metric)
        runs_of_rows = [
            [name for name in (row["run"], summary.latency and summary.latency.folder.name) if isinstance(name, str)]
            for row in summary.frame.to_dict("records")
        ]
        title = f"{group.task}, {group.model}, {group.n} questions"
        tables.append(from_frame(group.name, title, caption(summary), accuracy_table(summary), runs_of_rows))
        separation = separation_table(group, metric)
        tables += [efficiency_table(summary), *([] if separation is None else [separation])]
    tables += [table for run in runs if run.task == LATENCY for table in latency_tables(run)]
    tables += [half_precision_table(run) for run in runs if run.task == HALF_PRECISION]
    return tables + flops_tables(runs)


def chosen(tables: Sequence[Table], only: str | None) -> list[Table]:
    """Those whose names begin with one of the names in `only`.

    Raises:
        ValueError: there is none for one of the names.
    """
    if only is None:
        return list(tables)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if not any(table.name.startswith(name) for table in tables):
            raise ValueError(f"no table {name!r}; there are {', '.join(table.name for table in tables)}")
    return [table for table in tables if table.name.startswith(tuple(names))]


def accuracy_table(summary: Summary) -> pd.DataFrame:
    """The reproduce table: cells as they are printed."""
    unit = " %" if summary.percent else ""
    points = "points" if summary.percent else summary.metric
    controlled = summary.frame["control"].notna().any()
    rows = []
    for row in summary.frame.to_dict("records"):
        control = {f"to the matched control, {points} [95 %]": _to_control(row)} if controlled else {}
        rows.append({
            "method": row["method"],
            "budget": str(row["budget"]),
            "entering": number(row["entering"], 1),
            "leaving": number(row["leaving"], 1),
            f"{shown(summary.metric)}{unit} [95 %]": _missing(row) or interval(row),
            f"difference, {points} [95 %]": _difference(row),
            **control,
            "retained %": number(row["retained"], 1),
            "prefill GMACs": _counted(row),
            "prefill ms [quartiles]": _quartiles(row, "prefill_ms", 1),
            "ratio to unpruned [quartiles]": _quartiles(row, "prefill_ratio", 2),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _counted(row: dict) -> str:
    """A run without a count: its method keeps as many tokens as the picture asks for."""
    if pd.notna(row["value"]) and pd.isna(row["prefill_gmacs"]):
        return "not counted"
    return number(row["prefill_gmacs"], 3)


def _missing(row: dict) -> str:
    """Why a row has no value; empty if it has one."""
    if pd.notna(row["value"]):
        return ""
    return NOT_JUDGED if row["not_judged"] is True else NOT_RUN


def _difference(row: dict) -> str:
    if missing := _missing(row):
        return missing
    if row["method"] == "none":
        return "0"
    if pd.isna(row["difference"]):
        return "no unpruned run"
    return interval(row, "difference", "+")


def _to_control(row: dict) -> str:
    if pd.isna(row["value"]):
        return NOT_RUN
    if row["method"] == MATCHED:
        return "0"
    return NOTHING if pd.isna(row["control"]) else interval(row, "control", "+")


def _quartiles(row: dict, name: str, digits: int) -> str:
    low, high = row[f"{name}_q25"], row[f"{name}_q75"]
    text = number(row[name], digits)
    return text if pd.isna(low) else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def caption(summary: Summary) -> str:
    """What the table shows, on what, and what its numbers are not."""
    group = summary.group
    text = (
        f"{group.task} on the model {group.model}: {group.n} questions, seed {group.seed}. {embedded(group.model)}"
        f"Shown: {shown(summary.metric)}{' in %' if summary.percent else ''} with 95 % bootstrap interval; difference "
        "to the unpruned model with paired bootstrap interval over the same questions; retained: share of the unpruned "
        f"model's value. {kept_apart(group, summary.metric)}{_control_caption(summary)}"
        "Budget, entering and leaving: mean visual tokens per layer of the language model, of "
        f"{group.runs[0].metrics['tokens']['visual']:g}; budget is what was asked for, leaving what it counts, "
        f"entering what is computed. {_cost_caption(summary)}"
    )
    if summary.latency is None:
        return f"{text} Prefill time: {NOT_RUN}."
    timed = conditions(summary.latency, note=", tower and projector not included")
    return f"{text} Prefill time: median and quartiles of {timed}, from {summary.latency.folder.name}."


def _control_caption(summary: Summary) -> str:
    if summary.frame["control"].isna().all():
        return ""
    return (
        f"The matched control, {MATCHED}, keeps random tokens at SparseVLM's layers, in its numbers and with its "
        "recycling, so that the language model computes as much and nothing but the choice differs; differences to it "
        f"are paired, too ({NOTHING}: another number of tokens enters). random keeps its tokens from the input on and "
        "computes less. "
    )


def _cost_caption(summary: Summary) -> str:
    lengths = sorted({run.metrics["cost"]["text_tokens"] for run in summary.group.runs})
    return (
        "Prefill GMACs (1 GMAC = 2 GFLOP): the language model with the method's own work, wherever it does it (tower, "
        "projector, language model); without the tower's and the projector's. Counted by fvcore at "
        f"{' or '.join(map(str, lengths))} text tokens."
    )


if __name__ == "__main__":
    main()
