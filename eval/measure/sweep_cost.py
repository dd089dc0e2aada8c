"""What a sweep costs, against the sum of single runs.

    python -m eval.measure.sweep_cost --results results/reference --limit 48

Runs 3 methods x 3 budgets on `mini` twice: as one sweep, and one by one in fresh processes, in turns. Each process is
charged with its CPU time (user and system) and its wall time; the results of both must be the same. Writes
`<results>/sweep_cost/<date>.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from eval.errors import UserError
from eval.markdown import markdown_table
from eval.measure.once import run_command
from eval.runs import environment

_ROOT = Path(__file__).resolve().parents[2]
METHODS, BUDGETS = ("random", "fastv", "sparsevlm"), (192, 128, 64)


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--limit", type=int, default=48, help="questions of minivqa")

    run_command("sweep_cost", __doc__, add_arguments, lambda args, command: measure(args, command), argv)


def measure(args: argparse.Namespace, command: str) -> str:
    """Measure and write; return the table and where the file is."""
    git = environment.git_at_start()
    with tempfile.TemporaryDirectory() as scratch:
        single, sweep = Path(scratch, "single"), Path(scratch, "sweep")
        common = [f"limit={args.limit}", "task.seed=0"]
        timed(common + ["method=none", "limit=1", f"results_dir={scratch}/first"])  # files from disk, questions made
        each = {f"{m} {b}": timed([*common, f"method={m}", f"budget={b}", f"results_dir={single}"]) for m, b in pairs()}
        lists = [f"method={','.join(METHODS)}", f"budget={','.join(map(str, BUDGETS))}"]
        together = timed(["-m", *common, *lists, f"results_dir={sweep}"])
        same = scores(single) == scores(sweep)
    if not same:
        raise UserError("the sweep and the single runs gave different results")
    total = {key: sum(t[key] for t in each.values()) for key in ("cpu_s", "wall_s")}
    record = {
        "schema": 1,
        "command": command,
        "model": "mini",
        "task": "minivqa",
        "questions": args.limit,
        "methods": METHODS,
        "budgets": BUDGETS,
        "single_runs": each,
        "sum_of_single_runs": total,
        "sweep": together,
        "ratio": {key: together[key] / total[key] for key in total},
        "same_results": same,
        "note": "CPU time is the one to compare: wall time depends on what else the machine did",
        "load": os.getloadavg(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "git": git,
    }
    folder = args.results / "sweep_cost"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mini__n{args.limit}__{datetime.now():%Y%m%d_%H%M%S}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return table(record) + f"\n-> {path}"


def pairs() -> list[tuple[str, int]]:
    return [(method, budget) for method in METHODS for budget in BUDGETS]


def timed(arguments: list[str]) -> dict[str, float]:
    """CPU and wall seconds of one process of eval.run.

    Raises:
        UserError: it failed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "eval.run", *arguments], cwd=_ROOT, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"eval.run {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-400:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2)}


def scores(results: Path) -> dict[str, list]:
    """Answers and scores of all runs."""
    found = {}
    for path in sorted(results.glob("runs/*/samples.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path.parent.name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return found


def table(record: dict) -> str:
    """As Markdown."""
    rows = {"9 single runs": record["sum_of_single_runs"], "one sweep": record["sweep"], "ratio": record["ratio"]}
    lines = [[name, f"{t['cpu_s']:.2f}", f"{t['wall_s']:.2f}"] for name, t in rows.items()]
    return markdown_table(["", "CPU s", "wall s"], lines)


if __name__ == "__main__":
    main()
