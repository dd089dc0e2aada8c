"""Published numbers: `eval/published.csv`, one row per number, never mixed with measured ones.

Columns: paper, version (edition), table (or section) of it, model, method and benchmark (by their names in this
project where it has them; benchmark "average", "efficiency" or "headline" for what is no benchmark), tokens (the budget
as the source names it), metric, value as printed, unit, source (an address, or what was read), kind, confidence, flag,
recomputed, note.

kind        "paper": what a method's authors state; "rerun": what others measured; "recomputed": computed here
confidence  "quoted"; "digitized": read off a figure; "derived": computed; "secondary": read in another text
flag        "" or why the number is not to be relied on:
            "misprint": it does not follow from the numbers it is made of; "mixed rows": it follows from another row
            than the ones beside it; "stale": left over from an earlier edition; "lifted": it follows, but hangs on one
            outlier; "not measured": arithmetic, presented beside measurements
recomputed  of a flagged number, what it should be (empty where nothing can be said)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

PATH = Path(__file__).resolve().parents[1] / "eval" / "published.csv"
COLUMNS = (
    "paper", "version", "table", "model", "method", "tokens", "benchmark", "metric", "value", "unit", "source", "kind",
    "confidence", "flag", "recomputed", "note",
)  # fmt: skip
KINDS = ("paper", "rerun", "recomputed")
CONFIDENCE = ("quoted", "digitized", "derived", "secondary")
FLAGS = ("", "misprint", "mixed rows", "stale", "lifted", "not measured")
_KEY = ["paper", "version", "table", "model", "method", "tokens", "benchmark", "metric", "source", "note"]


@cache
def published(path: Path = PATH) -> pd.DataFrame:
    """All published numbers: the file's columns as text, and `number`, the value as float.

    Raises:
        ValueError: a column is missing, a value is no number, a name is unknown, or a number stands there twice.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(frame.columns) != COLUMNS:
        raise ValueError(f"{path} has the columns {', '.join(frame.columns)}; expected {', '.join(COLUMNS)}")
    for column, known in (("kind", KINDS), ("confidence", CONFIDENCE), ("flag", FLAGS)):
        strange = sorted(set(frame[column]) - set(known))
        if strange:
            raise ValueError(f"{path}: unknown {column} {strange[0]!r}; known: {', '.join(filter(None, known))}")
    try:
        frame["number"] = frame["value"].astype(float)
        frame.loc[frame["recomputed"] != "", "recomputed"].astype(float)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    empty = frame[(frame["source"] == "") | (frame["paper"] == "") | (frame["metric"] == "")]
    twice = frame[frame.duplicated(_KEY)]
    for rows, what in ((empty, "lacks its paper, metric or source"), (twice, "stands there twice")):
        if len(rows):
            raise ValueError(f"{path}: line {rows.index[0] + 2} {what}")
    return frame


def decimals(value: str) -> int:
    """Digits after the point, as printed."""
    return len(value.partition(".")[2])


def look_up(paper: str, version: str, table: str | None = None, **columns) -> pd.DataFrame:
    """Rows of one paper's edition, narrowed down by further columns."""
    frame = published()
    keep = (frame["paper"] == paper) & (frame["version"] == version)
    if table is not None:
        keep &= frame["table"] == table
    for column, value in columns.items():
        keep &= frame[column] == str(value)
    return frame[keep]
