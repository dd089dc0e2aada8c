"""Two processes on one run, as `accelerate-launch` starts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eval.run import CONFIGS

pytestmark = pytest.mark.slow
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]  # fmt: skip  - with --cpu it would quietly start one process; with --multi_gpu it needs no GPU
QUICK = ["-m", "method=random,tome", "budget=16", "limit=9", "batch_size=2"]


def start(folder: Path, *command: str, launcher=LAUNCH) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *command], cwd=folder, env=env, **pipes)


def timeless(results: Path) -> dict[str, object]:
    """What the runs of a folder found, without what depends on when and how fast."""
    found = {}
    for folder in sorted(results.glob("runs/*")):
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        metrics = json.loads((folder / "metrics.json").read_text())
        found[folder.name] = [{k: v for k, v in s.items() if k != "seconds"} for s in samples]
        found[folder.name] += [{k: v for k, v in metrics.items() if k not in ("time", "date", "git")}]
    return found


def test_two_find_what_one_finds(tmp_path):
    two = start(tmp_path, "-m", "eval.run", *QUICK, "results_dir=two")
    wrote: set[str] = set()
    while two.poll() is None:
        wrote |= {p.name for p in tmp_path.glob("two/runs/.*.partial/ledger.jsonl*") if p.stat().st_size}
        time.sleep(0.02)
    out, err = two.communicate(timeout=300)
    assert wrote == {"ledger.jsonl", "ledger.jsonl.1"}  # there really are two
    assert two.returncode == 0, err
    assert out.count("accuracy") == 2  # one speaks
    one = start(tmp_path, *QUICK, "results_dir=one", launcher=[sys.executable, "-m", "eval.run"])
    assert one.wait(timeout=300) == 0
    found = timeless(tmp_path / "two")
    assert len(found) == 2 and found == timeless(tmp_path / "one")
    names = ["config.yaml", "env.json", "metrics.json", "samples.jsonl"]
    assert all(sorted(os.listdir(f)) == names for f in (tmp_path / "two/runs").iterdir())


def test_a_killed_one_ends_the_other_and_another_number_goes_on(tmp_path):
    command = ["method=random", "budget=16", "limit=100", "batch_size=2"]
    started = start(tmp_path, "-m", "eval.run", *command)
    deadline = time.monotonic() + 200
    while len([p for p in tmp_path.glob("results/runs/.*.partial/ledger.jsonl*") if p.stat().st_size]) < 2:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(started.pid).children(recursive=True)
    next(c for c in children if c.environ().get("RANK") == "1").kill()
    _, err = started.communicate(timeout=100)
    assert started.returncode != 0
    assert "process 0 of 2 was stopped (all stop when one of them ends); " in err
    assert "answers are kept; rerun the same command to resume" in err
    (partial,) = tmp_path.glob("results/runs/.*.partial")
    kept = {
        (a["doc_id"], a["seconds"])
        for path in partial.glob("ledger.jsonl*")
        for a in map(json.loads, path.read_text().splitlines(keepends=False))
    }
    assert len(kept) >= 2
    one = start(tmp_path, *command, launcher=[sys.executable, "-m", "eval.run"])
    assert one.wait(timeout=300) == 0
    (folder,) = tmp_path.glob("results/runs/*")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["doc_id"] for s in samples] == list(range(100))
    assert kept <= {(s["doc_id"], s["seconds"]) for s in samples}  # not asked again
