"""Fixtures for all tests. Nothing here or in the tests reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import hub_layout  # noqa: E402

torch.set_num_threads(1)  # the models are tiny, and `-n auto` starts a worker per core


@pytest.fixture(scope="session")
def tiny_llava_folder(tmp_path_factory):
    """Folder of a tiny random checkpoint laid out like llava-hf/llava-1.5-7b-hf: 576 visual tokens, 32 layers."""
    return hub_layout.save_llava_7b(tmp_path_factory.mktemp("hub") / "llava-1.5-7b-hf")


@pytest.fixture(scope="session")
def tiny_video_llava_folder(tmp_path_factory):
    """Folder of a tiny random checkpoint laid out like LanguageBind/Video-LLaVA-7B-hf: 8 x 257 tokens, 4 layers."""
    return hub_layout.save_video_llava(tmp_path_factory.mktemp("hub") / "Video-LLaVA-7B-hf")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
