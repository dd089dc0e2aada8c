"""Tables in Markdown: one writer for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.markdown import markdown_of_records, markdown_table


def test_a_table_letter_by_letter():
    assert (
        markdown_table(["a", "b"], [[1, "x"], [2.5, "y|z"]]) == "| a | b |\n| --- | ---: |\n| 1 | x |\n| 2.5 | y\\|z |"
    )


@pytest.mark.parametrize(("left", "rule"), [(0, "| ---: | ---: | ---: |"), (2, "| --- | --- | ---: |"),
                                            ((0, 2), "| --- | ---: | --- |")])  # fmt: skip
def test_alignment(left, rule):
    assert markdown_table("abc", [], left).splitlines() == ["| a | b | c |", rule]


def test_records():
    rows = [{"m": "x", "n": 1}, {"m": "y", "n": 2}]
    assert markdown_of_records(rows, 1) == markdown_table(["m", "n"], [["x", 1], ["y", 2]], 1)


def test_nobody_else_writes_tables():
    root = Path(__file__).resolve().parents[2]
    sources = [path for room in ("eval", "scripts", "sparsevlm") for path in (root / room).rglob("*.py")]
    assert [path.name for path in sources if "---:" in path.read_text(encoding="utf-8")] == ["markdown.py"]
