"""Tables in GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence


def markdown_table(columns: Sequence[object], rows: Iterable[Iterable[object]], left: int | Collection[int] = 1) -> str:
    """Return a table, without a newline at its end.

    Args:
        columns: names.
        rows: one cell per column; bars in cells are escaped.
        left: how many of the first columns are left-aligned, or which ones; the others are right-aligned.
    """
    leading = range(left) if isinstance(left, int) else left
    rule = ["---" if i in leading else "---:" for i in range(len(columns))]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:]))


def markdown_of_records(rows: Sequence[Mapping[str, object]], left: int = 3) -> str:
    """Return a table of dicts with the same keys, which name the columns."""
    return markdown_table(list(rows[0]), [row.values() for row in rows], left)
