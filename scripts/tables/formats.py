"""A table whose numbers know where they are from, and how it is written: Markdown, CSV, LaTeX."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from csv import writer
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eval.markdown import markdown_table

NOT_RUN = "not run"
NOT_JUDGED = "not judged"  # the answers are there, but no language model scored them
NOTHING = "–"  # nobody published it
FLAGGED = "†"  # published, but not to be relied on; the caption or the page says why


@dataclass(frozen=True)
class Part:
    """One number of a cell.

    Attributes:
        text: as it is printed.
        label: whose it is ("ours", "paper", "rerun", ...) where a cell has several.
        runs: names of the run folders it is computed from.
        source: where a published number stands, with what is to be said about it.
    """

    text: str
    label: str = ""
    runs: tuple[str, ...] = ()
    source: str = ""


Cell = tuple[Part, ...]


def cell(text: str, *runs: str, source: str = "") -> Cell:
    """A cell with one number."""
    return (Part(text, runs=tuple(run for run in runs if run), source=source),)


def text_of(parts: Cell) -> str:
    """A cell as it is printed: ours | paper | rerun."""
    return " | ".join(part.text for part in parts)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its files.
        title: a few words.
        caption: what it shows, on what, and what would fill its gaps.
        columns: names.
        rows: one cell per column.
        header: number of leading columns that name the row.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    header: int = 2

    @property
    def texts(self) -> list[list[str]]:
        return [[text_of(parts) for parts in row] for row in self.rows]


def from_frame(name: str, title: str, caption: str, frame: pd.DataFrame, runs: Iterable[Sequence[str]]) -> Table:
    """A table of a frame of texts; `runs` has the run folders of each row."""
    rows = [[cell(text, *names) for text in row] for row, names in zip(frame.to_numpy(), runs, strict=True)]
    return Table(name, title, caption, list(frame.columns), rows, 1)


def write(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.md`, `.csv` and `.tex`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {".md": markdown(table), ".csv": csv(table), ".tex": latex(table)}
    for suffix, content in contents.items():
        (folder / f"{table.name}{suffix}").write_text(content, encoding="utf-8")
    return [folder / f"{table.name}{suffix}" for suffix in contents]


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown, caption first; numbers are right-aligned."""
    return f"{table.caption}\n\n{markdown_table(table.columns, table.texts, table.header)}\n"


def csv(table: Table) -> str:
    """Comma-separated values; a cell with several numbers becomes several columns ("GQA ours", "GQA paper")."""
    labels = [
        list(dict.fromkeys(part.label for row in table.rows for part in row[i])) for i in range(len(table.columns))
    ]
    out = io.StringIO()
    lines = writer(out, lineterminator="\n")
    lines.writerow(f"{c} {k}".strip() for c, keys in zip(table.columns, labels, strict=True) for k in keys)
    for row in table.rows:
        found = [{part.label: part.text for part in parts} for parts in row]
        lines.writerow(f.get(k, "") for f, keys in zip(found, labels, strict=True) for k in keys)
    return out.getvalue()


_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "|": r"\textbar{}",
          "<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "†": r"\textdagger{}", "±": r"\textpm{}"}  # fmt: skip


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(c, c) for c in text)


def latex(table: Table) -> str:
    """A LaTeX table for the booktabs package."""
    head, *body = [" & ".join(map(escape, row)) + r" \\" for row in [table.columns, *table.texts]]
    return "\n".join([
        r"% needs \usepackage{booktabs} and, for its width, \usepackage{graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_caption(table.caption)}}}",
        rf"\label{{tab:{table.name.replace('_', '-')}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{'l' * table.header}{'r' * (len(table.columns) - table.header)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
        "",
    ])  # fmt: skip


def _caption(text: str) -> str:
    """A caption, with `code` in typewriter. Commands are long words: they may break after commas, _ and /."""
    parts = [escape(part) for part in text.split("`")]
    for i in range(1, len(parts), 2):
        breakable = re.sub(r"(,|\\_|/)(?=\S)", r"\1\\allowbreak{}", parts[i])
        parts[i] = rf"\texttt{{{breakable}}}"
    return "".join(parts)
