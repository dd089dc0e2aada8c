"""Several processes that train one model, each on batches of its own.

``torchrun --nproc-per-node 2 -m sparsevlm.mini.training ...``: on a CPU two processes of one thread each get more done
than one of two threads.
"""

import os
import time
from collections.abc import Iterable, Iterator
from itertools import count

import torch
from torch import distributed


class ProcessGroup:
    """The processes that train one model together; a single process communicates nothing.

    Attributes:
        rank: of this process, 0 to ``size - 1``; rank 0 writes and speaks.
        size: how many there are.
    """

    def __init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo")
        together = distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def indices(self, step: int) -> Iterator[int]:
        """This process's batches from an optimiser step on: of every ``size`` batches one."""
        return count(step * self.size + self.rank, self.size)

    def now(self) -> float:
        """The first process's clock in seconds, so that all decide alike."""
        clock = torch.tensor([time.monotonic()], dtype=torch.float64)
        if self.size > 1:
            distributed.broadcast(clock, 0)
        return clock.item()

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by the mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(together)
        parts = together.div_(self.size).split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def close(self) -> None:
        """Waits for the other processes, then destroys the process group."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()
