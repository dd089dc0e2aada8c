"""The made-up hub cache, once; a judge on this machine."""

import pytest

from tests.eval.benchmarks import hub_cache
from tests.eval.benchmarks.judge_server import endpoint


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """HF_HOME with the data of all benchmarks."""
    home = hub_cache.build(tmp_path_factory.mktemp("hub") / "hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SPARSEVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield home


@pytest.fixture(scope="session")
def judge():
    with endpoint() as served:
        yield served
