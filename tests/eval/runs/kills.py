"""Kill runs at random moments and start them again; what comes out must be what an undisturbed run gives.

    python -m tests.eval.runs.kills 20 /tmp/kills    # kills, folder; prints how far the runs were when they were killed

The attempts are forks of a process that has loaded the libraries, so that most kills hit the work and not the start.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

import lmms_eval.evaluator  # noqa: F401
import torch

from eval.run import main

torch.set_num_threads(1)
COMMAND = ["-m", "method=random,tome,sparsevlm", "budget=16", "limit=24", "batch_size=2"]
TIMELESS = ("time", "date", "git")


def attempt(results: Path, seconds: float | None = None) -> int | None:
    """Start the runs in a process of its own and kill it after a time; returns its exit status, None = killed."""
    child = os.fork()
    if child == 0:
        log = os.open(results.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(main([*COMMAND, f"results_dir={results}"]))
    deadline = time.monotonic() + (seconds if seconds is not None else 3600)
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def outcome(results: Path) -> dict[str, bytes]:
    """The files of all runs as bytes, without what depends on when and how fast."""
    found = {}
    for folder in sorted((results / "runs").iterdir()):
        names = sorted(os.listdir(folder))
        assert names == ["config.yaml", "env.json", "metrics.json", "samples.jsonl"], (folder, names)
        metrics = json.loads((folder / "metrics.json").read_text())
        found[f"{folder.name} metrics"] = json.dumps({k: v for k, v in metrics.items() if k not in TIMELESS}).encode()
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        found[f"{folder.name} samples"] = json.dumps([{**line, "seconds": None} for line in lines]).encode()
    return found


def answered(results: Path) -> int:
    """Answers on disk, of finished and unfinished runs."""
    files = [*results.glob("runs/.*.partial/ledger.jsonl"), *results.glob("runs/*/samples.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in files)


def kill_often(kills: int, folder: Path, seed: int = 0) -> list[int]:
    """Kill runs as often as asked, over as many sweeps as that takes; returns the answers on disk at each kill."""
    draw = random.Random(seed)
    start = time.monotonic()
    assert attempt(folder / "undisturbed") == 0
    whole = time.monotonic() - start
    expected, moments, sweep = outcome(folder / "undisturbed"), [], 0
    while len(moments) < kills:
        sweep += 1
        results = folder / f"sweep{sweep}"
        while (status := attempt(results, draw.uniform(0, whole / 2) if len(moments) < kills else None)) is None:
            moments.append(answered(results))
        assert status == 0
        assert outcome(results) == expected
    return moments


if __name__ == "__main__":
    where = Path(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"kills": int(sys.argv[1]), "answers_at_each": kill_often(int(sys.argv[1]), where)}))
