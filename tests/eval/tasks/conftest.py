"""The made-up hub cache, once; a judge on this machine."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

from lmms_eval.api import task as lmms_task

from tests.eval.tasks import hub_cache
from tests.eval.tasks.judge_server import endpoint


@contextmanager
def used(home):
    """A folder as HF_HOME; lmms-eval remembers where the data are, so it is made to forget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
        lmms_task._resolve_hf_datasets_cache_dir.cache_clear()
        yield home
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    """HF_HOME with the data of all benchmarks."""
    home = hub_cache.build(tmp_path_factory.mktemp("hub") / "hf_home")
    with pytest.MonkeyPatch.context() as patch, used(home):
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SPARSEVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield home


@pytest.fixture
def own_hub(hub, tmp_path):
    """A copy of the hub cache to damage."""
    with used(Path(shutil.copytree(hub, tmp_path / "hf_home"))) as home:
        yield home


@pytest.fixture(scope="package")
def judge():
    with endpoint() as served:
        yield served
