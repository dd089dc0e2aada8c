"""Where tasks are, and where their data is kept."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Where generated questions are kept: $SPARSEVLM_CACHE, else ~/.cache/sparsevlm."""
    return Path(os.environ.get("SPARSEVLM_CACHE") or Path.home() / ".cache" / "sparsevlm")


def hf_home() -> Path:
    """The hub's cache, where lmms-eval looks for videos: $HF_HOME, else ~/.cache/huggingface."""
    return Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))


def datasets_cache() -> str:
    """Where lmms-eval has `datasets` keep what it prepared."""
    return os.environ.get("HF_DATASETS_CACHE") or str(hf_home() / "datasets")
