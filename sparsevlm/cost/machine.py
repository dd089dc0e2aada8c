"""What times depend on besides what is timed: processor, versions and code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import sparsevlm


def machine(device: torch.device) -> dict:
    """Processor, versions and commit, for the results measured on a device."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "sparsevlm": sparsevlm.__version__,
        "code": code_version(),
    }


def cpu_model() -> str:
    """Return the processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def code_version() -> str | None:
    """Commit of the checkout, marked if the package was changed since; None outside a checkout."""
    root = Path(sparsevlm.__file__).parent
    try:
        done = [
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["log", "-1", "--format=%H", "--", "."], ["status", "--porcelain", "--", "."])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0].strip()[:12] + ("+changes" if done[1].strip() else "") if done[0].strip() else None
