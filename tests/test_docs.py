"""The API reference is made of the docstrings without a complaint."""

import shlex
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_public_module_has_its_page(tmp_path):
    import pdoc

    made = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = next(line for line in made.splitlines() if " -m pdoc " in line)
    modules = [word for word in shlex.split(command) if word.startswith("sparsevlm")]
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # as the Makefile does
        pdoc.pdoc(*modules, output_directory=tmp_path)
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    public = {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for path in (ROOT / "sparsevlm").rglob("[!_]*.py")
        if "training" not in path.parts
    }
    assert public <= pages
    text = (tmp_path / "sparsevlm" / "budget.html").read_text()
    assert ">Raises:</" in text  # a section of its own, no longer a line of the text
