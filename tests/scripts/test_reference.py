"""The reference results that are kept in git: tables come from their runs, and the README quotes them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.make_tables import build_tables
from scripts.runs import read_runs
from scripts.tables import csv, latex, markdown

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results" / "reference"
FOLDERS = [p.parent for p in sorted(REFERENCE.rglob("runs")) if p.is_dir()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(REFERENCE)))
def test_tables_come_from_the_runs_beside_them(folder):
    runs = read_runs(folder)
    tables = {table.name: table for table in build_tables(runs)}
    kept = {
        path.stem
        for path in (folder / "tables").glob("*.md")
        if not path.stem.startswith(("half_precision", "flops__"))
    }
    papers = {name for name in tables if "__" not in name}
    assert kept == set(tables) if folder == REFERENCE else kept == set(tables) - papers
    for name in kept:
        for suffix, written in ((".md", markdown), (".csv", csv), (".tex", latex)):
            path = folder / "tables" / f"{name}{suffix}"
            assert path.read_text(encoding="utf-8") == written(tables[name]), path


def test_the_readme_quotes_the_reference_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = next((REFERENCE / "tables").glob("minivqa__mini__n400__*.md")).read_text(encoding="utf-8").splitlines()
    rows = [line for line in table if line.startswith("|")]
    start = readme.index(rows[0])
    assert readme[start : start + len(rows)] == rows


def test_the_pictures_of_the_readme_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for part in readme.split("](")[1:]:
        target = part.split(")")[0]
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
