"""Notebooks run from a fresh clone and are kept without outputs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.scripts import folders

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path, results: Path) -> list:
    """Run a notebook in `folder` on the results of `results`; returns its outputs."""
    notebook = nbformat.read(path, as_version=4)
    changed = [cell for cell in notebook.cells if cell.source.startswith("RESULTS = ")]
    assert len(changed) == 1
    first, rest = changed[0].source.split("\n", 1)
    changed[0].source = f"RESULTS = Path({str(results)!r})\n{rest}"
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(outputs: list) -> str:
    return "".join(o.get("text", "") or str(o.get("data", {}).get("text/html", "")) for o in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_are_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"clear the outputs of {path.name}"


def test_inspect_pruning_runs_in_its_folder(tmp_path):
    folders.accuracy_run(tmp_path)
    folders.accuracy_run(tmp_path, "sparsevlm", 64)
    outputs = execute(ROOT / "notebooks" / "inspect_pruning.ipynb", ROOT / "notebooks", tmp_path)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = text_of(outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4
    assert "sparsevlm" in text and "not run" in text  # the table of the results
    assert text.count("raters: ") == 4 and "64.0 leaving" in text
    shared = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of the (\d+) patches", text)]
    assert len(shared) == 6  # three pruning layers, compared twice
    assert shared[2][0] < shared[2][1] and shared[5][0] < shared[5][1]  # another question keeps other patches


@pytest.mark.slow
def test_inspect_pruning_runs_in_the_root_without_results(tmp_path):
    outputs = execute(ROOT / "notebooks" / "inspect_pruning.ipynb", ROOT, tmp_path)
    assert not [o for o in outputs if o.output_type == "error"]
    assert "No runs yet" in text_of(outputs)
