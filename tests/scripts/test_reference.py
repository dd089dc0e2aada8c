"""The reference results that are kept in git: tables come from their runs, and the README quotes them as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.make_tables import make_tables

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results" / "reference"
FOLDERS = [p.parent for p in sorted(REFERENCE.rglob("runs")) if p.is_dir()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(REFERENCE)))
def test_tables_come_from_the_runs_beside_them(folder, tmp_path):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for new in make_tables(tmp_path):
        for suffix in (".md", ".csv", ".tex"):
            name = new.with_suffix(suffix).name
            assert (tmp_path / "tables" / name).read_text() == (folder / "tables" / name).read_text(), name


def test_the_readme_quotes_the_reference_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = next((REFERENCE / "tables").glob("minivqa__mini__*.md")).read_text(encoding="utf-8").splitlines()
    rows = [line for line in table if line.startswith("|")]
    start = readme.index(rows[0])
    assert readme[start : start + len(rows)] == rows


def test_the_pictures_of_the_readme_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for part in readme.split("](")[1:]:
        target = part.split(")")[0]
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
