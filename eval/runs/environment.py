"""On what a run was made: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import sparsevlm

_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("sparsevlm", "eval", "configs", "scripts")  # folders whose changes make a commit an incomplete description
_PACKAGES = ("torch", "transformers", "lmms-eval", "datasets", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python, this project and what its numbers depend on; None = not installed."""
    found = {"python": platform.python_version(), "sparsevlm": sparsevlm.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def packages() -> dict[str, str]:
    """All installed distributions."""
    return dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions() if d.metadata["Name"]))


def hardware() -> dict:
    """CPU model, logical cores, threads torch uses, GPUs (None without) and operating system."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpus or None,
        "os": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """Return the processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git() -> dict | None:
    """Commit of this checkout, and whether its code was changed since; None outside a checkout of this project."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != _ROOT:
            return None
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", *_CODE))}
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def git_at_start() -> dict | None:
    """Return what :func:`git` said the first time this process asked: Python runs the files that it read at its start,
    whatever is committed or edited later."""
    return git()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
