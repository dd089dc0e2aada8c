"""Several processes on one run: started by `accelerate-launch` (or torchrun), one GPU or some cores each.

    accelerate-launch --multi_gpu --num_processes 4 -m eval.run model=llava_1_5_7b method=sparsevlm task=gqa budget=192

`accelerate launch` is the same, but cannot start beside a CPU-only torch with PyPI's torchvision. Without GPUs the
option is the same too: with `--cpu`, accelerate quietly starts one process.

Each process asks its share of the batches and writes its own ledger; the first one scores and writes the results. The
launcher ends all processes when one of them dies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

_WAIT = timedelta(days=7)  # for the process with the longest share, and for scoring: both may take hours
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class ProcessGone(RuntimeError):
    """Another process of the run ended before it had done its part."""


def is_first() -> bool:
    """Whether this process is the one that scores, writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


class Processes:
    """The processes that work on the runs of one command.

    Attributes:
        number: this one's, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.number, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_WAIT)  # a few bytes now and then; GPUs need not talk

    @property
    def first(self) -> bool:
        """See :func:`is_first`."""
        return self.number == 0

    def gather(self, mine) -> list:
        """Return the objects of all processes in their order; wait for all.

        Raises:
            ProcessGone: another process has ended.
        """
        if self.count == 1:
            return [mine]
        everyone: list = [None] * self.count
        try:
            dist.all_gather_object(everyone, mine)
        except RuntimeError as error:
            raise ProcessGone(f"another of the {self.count} processes ended; what it had answered is kept") from error
        return everyone

    def close(self) -> None:
        """Destroy the process group."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def single_process_env() -> Iterator[None]:
    """Hide the other processes from libraries, for work that only the first process does."""
    before = {name: os.environ.pop(name) for name in _NAMES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def resolve_device(device: str) -> str:
    """Return the device of this process: for "auto" a GPU if there is one; each process on a machine gets its own GPU.

    Raises:
        ValueError: more processes than GPUs.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cuda" or processes == 1:
        return device
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes for {torch.cuda.device_count()} GPUs: start one for each (--num_processes)"
        )
    return f"cuda:{local}"
