"""Notebooks run, with small settings, and are kept without outputs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.scripts import folders

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SMALL = {  # what the tests set instead
    "add_your_own_method": {"QUESTIONS": "4"},
    "quickstart": {"BUDGETS": "[64]"},
    "reproduce_table_1": {"QUESTIONS": "2", "METHODS, BUDGETS": '["random"], [64]'},
    "see_what_is_pruned": {},
    "speed_and_memory": {"ROUNDS": "2", "SETTINGS": '[("none", "full", {}), ("sparsevlm", 64, {})]'},
}


def code_of(path: Path, settings: dict[str, str]) -> list[str]:
    """The code cells of a notebook with other settings."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for name, value in settings.items():
        found = [i for i, source in enumerate(cells) if re.search(rf"^{re.escape(name)} = ", source, re.M)]
        assert len(found) == 1, f"{path.name} sets {name} {len(found)} times"
        line = f"{name} = {value}"
        cells[found[0]] = re.sub(rf"^{re.escape(name)} = .*$", lambda _, new=line: new, cells[found[0]], flags=re.M)
    return cells


def execute(cells: list[str], folder: Path) -> list[list]:
    """Run cells in one kernel, started in `folder`; returns the outputs of each."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Outputs of all notebooks, by name. They share a kernel, to load torch once, but no names."""
    results = tmp_path_factory.mktemp("results")
    folders.accuracy_run(results)
    folders.accuracy_run(results, "sparsevlm", 64)
    parts = {}
    for name, path in NOTEBOOKS.items():
        settings = dict(SMALL[name])
        if name in ("see_what_is_pruned", "reproduce_table_1"):
            settings["RESULTS"] = f"Path({str(results)!r})"
        parts[name] = code_of(path, settings)
    ran = iter(execute([s for part in parts.values() for s in [*part, "%reset -f"]], ROOT / "notebooks"))
    return {name: [o for _ in [*part, ""] for o in next(ran)] for name, part in parts.items()}


def text_of(outputs: list) -> str:
    kinds = ("text/html", "text/markdown", "text/plain")
    return "".join(
        o.get("text", "") or next((o["data"][k] for k in kinds if k in o.get("data", {})), "") for o in outputs
    )


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda p: p.stem)
def test_no_outputs_are_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stem in SMALL
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"clear the outputs of {path.name}"


def test_nothing_fails_or_warns(outputs):
    for name, found in outputs.items():
        strange = [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
        assert not strange or name == "reproduce_table_1" and "Error" not in text_of(strange), (name, strange)


def test_quickstart(outputs):
    text = text_of(outputs["quickstart"])
    assert "budget 64: " in text and "leaving 64.0" in text and "sparsevlm_plus" in text
    assert text.count("layer ") == 3 and "ratters" in text
    assert re.search(r"row of the prefill: \[(\d+)(, \1){2,}\]", text)  # alone or in a batch: as many tokens


def test_see_what_is_pruned(outputs):
    found = outputs["see_what_is_pruned"]
    text = text_of(found)
    assert sum("image/png" in o.get("data", {}) for o in found) == 4
    assert "sparsevlm" in text and "not run" in text  # the table of the results
    assert text.count("raters: ") == 4 and "64.0 leaving" in text
    shared = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of the (\d+) patches", text)]
    assert len(shared) == 6  # three pruning layers, compared twice
    assert shared[2][0] < shared[2][1] and shared[5][0] < shared[5][1]  # another question keeps other patches


def test_speed_and_memory(outputs):
    text = text_of(outputs["speed_and_memory"])
    assert "llm_prefill" in text and "ratio to unpruned" in text and "1.00 [1.00, 1.00]" in text
    assert "KV cache MB" in text and "tokens per layer" in text


def test_add_your_own_method(outputs):
    text = text_of(outputs["add_your_own_method"])
    assert "576 -> 64 visual tokens at layer -1" in text
    assert re.search(r"loudest: [\d.]+ %, to random [+-][\d.]+ \[", text)


def test_reproduce_table_1(outputs):
    text = text_of(outputs["reproduce_table_1"])
    assert r"not run \| 59.5 \| 59.5" in text and "experiment=llava_1_5_7b_paper" in text
    assert "42.44" in text and "2 questions" in text and "not a 7B" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["see_what_is_pruned", "reproduce_table_1"])
def test_alone_in_the_root_without_results(name, tmp_path):
    cells = code_of(NOTEBOOKS[name], {**SMALL[name], "RESULTS": f"Path({str(tmp_path)!r})"})
    if name == "reproduce_table_1":
        folders.accuracy_run(tmp_path / "reference")
    text = text_of([o for found in execute(cells, ROOT) for o in found])
    assert ("No runs yet" if name == "see_what_is_pruned" else "59.5") in text
