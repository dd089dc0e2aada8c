"""CONTRIBUTING.md is followed literally: its method, model and task are added to a copy and tried there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsevlm.methods.fastv import FastV
from tests.tiny import inputs, llava

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
STEPS = re.split(r"^### \d\. ", TEXT, flags=re.MULTILINE)[1:]
PARTS = ("sparsevlm", "eval", "configs", "tests", "pyproject.toml", "CONTRIBUTING.md")


def block(step: int, language: str, number: int = 0) -> str:
    """A fenced block of a step."""
    return re.findall(rf"^```{language}\n(.*?)^```", STEPS[step - 1], re.DOTALL | re.MULTILINE)[number]


def path(step: int, pattern: str) -> str:
    """The path that a step names."""
    return re.search(rf"`({pattern})`", STEPS[step - 1]).group(1)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository in which the five steps were taken."""
    folder = tmp_path_factory.mktemp("repository")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
        else:
            shutil.copy(ROOT / part, folder / part)
    assert len(STEPS) == 5
    (folder / path(1, r"sparsevlm/methods/\w+\.py")).write_text(block(1, "python"))
    (folder / path(3, r"configs/method/\w+\.yaml")).write_text(block(3, "yaml"))
    matrix = folder / path(4, r"tests/methods/test_matrix\.py")
    before, after = matrix.read_text().split("METHODS = {\n")
    matrix.write_text(before + "METHODS = {\n" + block(4, "python") + after)
    bases = folder / path(4, r"tests/methods/test_bases\.py")
    before, after = bases.read_text().split("OPTIONS = {\n")
    bases.write_text(before + "OPTIONS = {\n" + block(4, "python", 1) + after)
    own = folder / path(4, r"tests/methods/test_loudest\.py")
    own.parent.mkdir(exist_ok=True)
    own.write_text(block(4, "python", 2))
    return folder


def run(folder: Path, *arguments: str) -> str:
    """Output of `python` with these arguments in the copy; fails unless it succeeds."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_example_passes_the_matrix_and_its_own_test(copy: Path):
    own = path(4, r"tests/methods/test_loudest\.py")
    out = run(copy, "-m", "pytest", "-q", "tests/methods/test_matrix.py", own, "-k", "loudest or every_method_is_here")
    cases = 1 + 1 + 3 * 6 + 1  # all methods are there, the YAML, three properties on six models, its own test
    assert f"{cases} passed" in out, out


def test_the_example_is_clean(copy: Path):
    run(copy, "-m", "ruff", "check", path(1, r"sparsevlm/methods/\w+\.py"), path(4, r"tests/methods/test_loudest\.py"))


def members(table: str) -> set[str]:
    """The members that a table of step 1 lists."""
    rows = re.search(rf"^\| of `{table}` .*\n((?:\|.*\n)+)", STEPS[0], re.MULTILINE).group(1).splitlines()[1:]
    return {name for row in rows for name in re.findall(r"`(\w+)(?:\([\w, ]*\))?`", row.split("|")[1])}


@pytest.mark.parametrize("table", ["stage", "prefill"])
def test_methods_use_what_the_tables_list_and_no_more(table: str):
    """Of a stage and of a prefill; what is listed is there, and everything is used or documented at its place."""
    sources = "\n".join(file.read_text() for file in (ROOT / "sparsevlm" / "methods").glob("*.py"))
    used = set(re.findall(rf"\b{table}\.(\w+)", sources)) - {"_", "after"}
    assert used <= members(table), used - members(table)
    seen = []

    def look(self, stage):
        seen.extend((stage, stage.prefill))
        return original(self, stage)

    model, original = llava(), FastV.score
    with pytest.MonkeyPatch.context() as patch, FastV(k=2, keep=9)(model):
        patch.setattr(FastV, "score", look)
        model(**inputs("one", model)[0])
    of = seen[0] if table == "stage" else seen[1]
    assert [name for name in members(table) if not hasattr(of, name)] == []


def test_a_model_and_a_task_are_added_as_described(copy: Path):
    model, task = (re.split(r"^## Adding a ", TEXT, flags=re.MULTILINE)[i] for i in (2, 3))
    assert model.startswith("model\n") and task.startswith("task\n")
    lines = re.search(r"^```yaml\n(.*?)^```", model, re.DOTALL | re.MULTILINE)[1]
    (copy / re.search(r"`(configs/model/my_\w+\.yaml)`", model)[1]).write_text(lines)
    further = copy / re.search(r"`(eval/tasks/\w+\.py)`", task)[1]
    entry = re.search(r"^```python\n(.*?)^```", task, re.DOTALL | re.MULTILINE)[1]
    before, after = further.read_text().split("FURTHER = (\n")
    further.write_text(f"{before}FURTHER = (\n{entry.rstrip()},\n{after}")
    assert "realworldqa          765 questions  RealWorldQA\n" in run(copy, "-m", "eval.tasks")
    out = run(copy, "-m", "eval.fetch", "model=my_llava", "task=realworldqa", "--dry-run")
    assert "model my_llava: org/my-llava, " in out and "task realworldqa: lmms-lab-encoder/RealWorldQA, " in out


@pytest.mark.slow
def test_the_example_runs(copy: Path):
    command = block(5, "bash").split()
    assert command[0] == "python"
    out = run(copy, *command[1:])
    assert "accuracy" in out and "128.0 leaving" in out
    assert list((copy / "results" / "runs").glob("*loudest__128*/metrics.json"))
