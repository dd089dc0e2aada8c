"""The embedded model, once; caches and generated questions go to temporary folders."""

import os
import tempfile

if "HF_HOME" not in os.environ:
    _home = tempfile.TemporaryDirectory(prefix="hf-home-")  # removed at exit
    os.environ["HF_HOME"] = _home.name

import pytest  # noqa: E402

import sparsevlm  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def question_cache(tmp_path_factory):
    """Where generated questions are kept during the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEVLM_CACHE", str(tmp_path_factory.mktemp("questions")))
        yield


@pytest.fixture(scope="session")
def mini():
    """(model, processor) of the embedded model."""
    return sparsevlm.load("mini")
