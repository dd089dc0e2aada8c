"""The API reference is made of the docstrings without a complaint."""

import warnings

import pytest


@pytest.mark.slow
def test_every_public_module_has_its_page(tmp_path):
    import pdoc

    import sparsevlm

    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # see the Makefile
        pdoc.pdoc("sparsevlm", output_directory=tmp_path)
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    assert {f"sparsevlm/methods/{name}" for name in sparsevlm.methods()} <= pages
    assert {"sparsevlm", "sparsevlm/budget", "sparsevlm/core/scores", "sparsevlm/runtime/stage"} <= pages
    text = (tmp_path / "sparsevlm" / "budget.html").read_text()
    assert ">Raises:</" in text  # a section of its own, no longer a line of the text
