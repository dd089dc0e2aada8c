"""Accuracy and cost tables (Markdown, CSV, LaTeX) from run folders, and from nothing else.

    python scripts/make_tables.py --results results

Writes one table per task, model and set of questions to `<results>/tables/`, and one per latency run. A setting that
nobody ran says "not run". A run folder that is broken ends the script with its name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from scripts.runs import LATENCY, BadRun, Run, accuracy_groups, read_runs, unfinished
from scripts.summary import Summary, label, place, summarise

NOT_RUN = "not run"


def main(argv: list[str] | None = None) -> None:
    """Write all tables; exit status 1 and one line on stderr if a run cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--metric", help="which metric of the runs (default: accuracy, or else their first)")
    args = parser.parse_args(argv)
    try:
        written = make_tables(args.results, args.metric)
    except (BadRun, ValueError, OSError) as error:
        sys.exit(f"make_tables: {error}")
    for folder in unfinished(args.results):
        print(f"left out, not finished: {folder} (the same command again finishes it)", file=sys.stderr)
    for path in written:
        print(path)


def make_tables(results: Path, metric: str | None = None) -> list[Path]:
    """Write the tables of all runs under `results` and return the paths of the Markdown files.

    Raises:
        BadRun: a run folder cannot be used; nothing is written then.
        ValueError: runs without the metric asked for.
    """
    runs = read_runs(results)
    tables = {}
    for group in accuracy_groups(runs):
        summary = summarise(group, runs, metric)
        tables[group.name] = accuracy_table(summary), caption(summary)
    for run in runs:
        if run.task == LATENCY:
            tables[run.folder.name] = latency_table(run), latency_caption(run)
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (table, text) in tables.items():
        (folder / f"{name}.md").write_text(markdown(table, text), encoding="utf-8")
        table.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.tex").write_text(latex(table, text, name), encoding="utf-8")
    return [folder / f"{name}.md" for name in tables]


def accuracy_table(summary: Summary) -> pd.DataFrame:
    """The reproduce table: cells as they are printed."""
    unit = " %" if summary.percent else ""
    points = "points" if summary.percent else summary.metric
    rows = []
    for row in summary.frame.to_dict("records"):
        rows.append({
            "method": row["method"],
            "budget": str(row["budget"]),
            "entering": _number(row["entering"], 1),
            "leaving": _number(row["leaving"], 1),
            f"{summary.metric}{unit} [95 %]": _interval(row["value"], row["low"], row["high"], 1),
            f"difference, {points} [95 %]": _difference(row),
            "retained %": _number(row["retained"], 1),
            "prefill GMACs": _counted(row),
            "prefill ms [quartiles]": _interval(
                row["prefill_ms"], row["prefill_ms_q25"], row["prefill_ms_q75"], 1
            ),
            "ratio to unpruned [quartiles]": _interval(
                row["prefill_ratio"], row["prefill_ratio_q25"], row["prefill_ratio_q75"], 2
            ),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _counted(row: dict) -> str:
    """A run without a count: its method keeps as many tokens as the picture asks for."""
    if pd.notna(row["value"]) and pd.isna(row["prefill_gmacs"]):
        return "not counted"
    return _number(row["prefill_gmacs"], 3)


def _difference(row: dict) -> str:
    if pd.isna(row["value"]):
        return NOT_RUN
    if row["method"] == "none":
        return "0"
    if pd.isna(row["difference"]):
        return "no unpruned run"
    return _interval(row["difference"], row["difference_low"], row["difference_high"], 1, sign="+")


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return NOT_RUN if pd.isna(value) else f"{value:{sign}.{digits}f}"


def _interval(value: float, low: float, high: float, digits: int, sign: str = "") -> str:
    if pd.isna(value) or pd.isna(low):
        return _number(value, digits, sign)
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def caption(summary: Summary) -> str:
    """What the table shows, on what, and what its numbers are not."""
    group = summary.group
    text = (
        f"{group.task} on the model {group.model}: {group.n} questions, seed {group.seed}. {_not_7b(group.model)}"
        f"Shown: {summary.metric}{' in %' if summary.percent else ''} with 95 % bootstrap interval; difference to the "
        "unpruned model with paired bootstrap interval over the same questions; retained: share of the unpruned "
        "model's value. Budget, entering and leaving: mean visual tokens per layer of the language model, of "
        f"{group.runs[0].metrics['tokens']['visual']:g}; budget is what was asked for, leaving what it counts, "
        f"entering what is computed. {_cost_caption(summary)}"
    )
    if summary.latency is None:
        return f"{text} Prefill time: {NOT_RUN}."
    return f"{text} Prefill time: {_timing(summary.latency)}, from {summary.latency.folder.name}."


def _not_7b(model: str) -> str:
    if not model.startswith("mini"):
        return ""
    return "This is the small embedded model, not a 7B: its numbers say nothing about LLaVA-1.5. "


def _cost_caption(summary: Summary) -> str:
    lengths = sorted({run.metrics["cost"]["text_tokens"] for run in summary.group.runs})
    return (
        "Prefill GMACs (1 GMAC = 2 GFLOP) of the language model with the method's own work, counted by fvcore at "
        f"{' or '.join(map(str, lengths))} text tokens."
    )


def _timing(run: Run) -> str:
    row, hardware = run.metrics["rows"][0], run.metrics["hardware"]
    threads = "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
    on_gpu = run.config["device"].startswith("cuda")
    device = ", ".join(hardware["gpu"]) if on_gpu else f"{hardware['cpu']}, {threads}"
    return (
        f"median and quartiles of {run.metrics['n']} interleaved rounds at batch {row['batch_size']} and "
        f"{row['text_tokens']} text tokens, image encoding not included, {run.config['dtype']} on {device}"
    )


def latency_table(run: Run) -> pd.DataFrame:
    """One latency run, all that it measured."""
    rows = []
    for row in sorted(run.metrics["rows"], key=lambda r: place(label(r["method"], r["options"]), r["budget"])):
        cells = {"method": label(row["method"], row["options"]), "budget": str(row["budget"])}
        cells |= {key: _number(row[key], 1) for key in ("entering", "leaving")}
        for key, name, digits in (
            ("prefill_ms", "prefill ms", 1),
            ("prefill_ratio", "prefill ratio to unpruned", 2),
            ("vision_ms", "image encoding ms", 1),
            ("decode_ms", "decode ms/token", 2),
        ):
            cells[name] = _interval(row[key]["median"], row[key]["q25"], row[key]["q75"], digits)
        rows.append(cells)
    return pd.DataFrame(rows)


def latency_caption(run: Run) -> str:
    """What was timed, on what."""
    return f"Latency of the model {run.model}: {_timing(run)}. {_not_7b(run.model)}".strip()


def markdown(table: pd.DataFrame, text: str) -> str:
    """A table in GitHub's Markdown, caption first; numbers are right-aligned."""
    lines = [
        text,
        "",
        "| " + " | ".join(table.columns) + " |",
        "| --- |" + " ---: |" * (len(table.columns) - 1),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.to_numpy()),
    ]
    return "\n".join(lines) + "\n"


_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(c, c) for c in text)


def latex(table: pd.DataFrame, text: str, name: str) -> str:
    """A LaTeX table for the booktabs package."""
    rows = [[escape(cell) for cell in row] for row in [table.columns, *table.to_numpy()]]
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([
        r"% needs \usepackage{booktabs} and, for its width, \usepackage{graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{escape(text)}}}",
        rf"\label{{tab:{name.replace('_', '-')}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
