"""The reference results that are kept in git: tables come from their runs, and the README quotes them as they are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from eval.runs.reader import read_runs
from scripts import update_readme
from scripts.make_tables import build_tables
from scripts.tables.formats import csv, latex, markdown

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results" / "reference"
FOLDERS = [p.parent for p in sorted(REFERENCE.rglob("runs")) if p.is_dir()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(REFERENCE)))
def test_tables_come_from_the_runs_beside_them(folder):
    runs = read_runs(folder)
    tables = {table.name: table for table in build_tables(runs)}
    kept = {path.stem for path in (folder / "tables").glob("*.md")}
    papers = {name for name in tables if "__" not in name}
    assert kept == set(tables) if folder == REFERENCE else kept == set(tables) - papers
    for name in kept:
        for suffix, written in ((".md", markdown), (".csv", csv), (".tex", latex)):
            path = folder / "tables" / f"{name}{suffix}"
            assert path.read_text(encoding="utf-8") == written(tables[name]), path


@pytest.mark.parametrize("name", update_readme.DOCUMENTS)
def test_documents_quote_the_reference(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    made = update_readme.updated(name, text, REFERENCE)
    assert made == text, "python scripts/update_readme.py makes its tables anew"
    row = next(line for line in text.split("<!-- end -->")[0].splitlines()[::-1] if line.startswith("|"))
    changed = text.replace(row, row.replace("|", "| 9", 1), 1)
    assert changed != text and update_readme.updated(name, changed, REFERENCE) == text
    with pytest.raises(ValueError, match="marks"):
        update_readme.updated(name, text.replace("<!-- end -->", ""), REFERENCE)


def committed_with_changes() -> dict[str, set[str]]:
    """Folders under results/reference -> commits of their runs that were made with uncommitted changes."""
    found: dict[str, set[str]] = {}
    for path, git in records():
        if git["dirty"]:
            found.setdefault(str(path.relative_to(REFERENCE).parts[0]), set()).add(git["commit"])
    return found


def records() -> list[tuple[Path, dict]]:
    """Every file of the reference that says at which commit it was made, and what it says."""
    found = []
    for path in sorted(REFERENCE.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name != "env.json" and isinstance(content, dict) and "git" in content:
            found.append((path, content["git"]))
    return found


# Made before commits were checked, still to be made anew at a clean one; a folder that has been goes from this list.
MADE_WITH_CHANGES = {"runs", "separation", "separation_seeds"}


def test_results_are_made_at_a_clean_commit_that_is_named():
    assert {*committed_with_changes()} == MADE_WITH_CHANGES, "see the comment above MADE_WITH_CHANGES"
    commits = {git["commit"] for _, git in records()}
    assert all(len(commit) == 40 for commit in commits)
    shallow = git_output("rev-parse", "--is-shallow-repository")
    if shallow == "false":  # elsewhere (an archive, a shallow clone) the history cannot be asked
        missing = [commit for commit in commits if git_output("cat-file", "-t", commit) != "commit"]
        assert not missing


def git_output(*arguments: str) -> str | None:
    """What git prints; None where there is no git or no repository, or git refuses."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
