"""Training in several processes."""

import os
import socket
import subprocess
import sys

import torch

RANK = """
import sys, torch
from itertools import islice
from sparsevlm.mini.training.distributed import ProcessGroup
group = ProcessGroup()
weights = [torch.nn.Parameter(torch.zeros(size)) for size in ((2, 3), 4, 1)]
weights[0].grad, weights[1].grad = torch.full((2, 3), 1.0 + group.rank), torch.arange(4.0) * (1 - group.rank)
group.average_gradients(weights)
found = {"first": group.first, "gradients": [w.grad for w in weights], "clock": group.now()}
torch.save(found | {"batches": list(islice(group.indices(3), 3))}, f"{sys.argv[1]}/{group.rank}.pt")
group.close()
"""


def test_two_processes_average_gradients_share_a_clock_and_divide_the_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    started = [subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["clock"] == other["clock"] and one["first"] and not other["first"]
    assert (one["batches"], other["batches"]) == ([6, 8, 10], [7, 9, 11])
    for found in (one["gradients"], other["gradients"]):
        assert torch.equal(found[0], torch.full((2, 3), 1.5)) and torch.equal(found[1], torch.arange(4.0) / 2)
        assert found[2] is None
