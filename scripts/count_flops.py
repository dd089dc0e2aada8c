"""Count the multiply-adds of a published model at the paper's settings and keep them as a run folder.

    python scripts/count_flops.py --results results      # minutes; needs no weights

Writes `<results>/runs/flops__<model>__<hash>/`; the same command again finds it and counts nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

if not __package__:  # started as a file: this folder must go anyway, a `profile` in it hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import yaml
from tqdm import tqdm

from eval import environment
from eval.errors import UserError, one_line
from eval.results import RunFolder
from scripts.runs import FLOPS, SCHEMA
from sparsevlm.cost.flops import PARTS, prefill_gmacs
from sparsevlm.cost.flops import run as count

METHODS = "tome,fastv,pyramiddrop,sparsevlm,visionzip,divprune"
BUDGETS = "192,128,64"


def main(argv: list[str] | None = None) -> None:
    """Count and write; one line on stderr and exit status 2 for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--model", default="llava-1.5-7b", help="as sparsevlm.cost.flops takes it")
    parser.add_argument("--methods", default=METHODS, help="separated by commas; the unpruned model comes first")
    parser.add_argument("--budgets", default=BUDGETS, help="separated by commas")
    parser.add_argument("--text-tokens", type=int, default=118, help="non-visual tokens (118: the paper's column)")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "scripts/count_flops.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        print(count_all(args, command))
    except (UserError, ValueError, OSError) as error:
        print(f"count_flops: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def count_all(args: argparse.Namespace, command: str) -> str:
    """Count what `args` ask for, unless that was done, and return the folder.

    Raises:
        UserError, ValueError, OSError: unknown names, budgets that a method cannot keep, a folder that cannot be used.
    """
    try:
        budgets = [int(b) for b in args.budgets.split(",")]
    except ValueError as error:
        raise UserError(f"budgets {args.budgets!r} are no whole numbers separated by commas") from error
    settings = [("none", "full"), *((m, b) for m in args.methods.split(",") for b in budgets)]
    built = {setting: sparsevlm.build(setting[0], budget=setting[1]) for setting in settings}
    name = args.model.replace("-", "_").replace(".", "_")
    config = {"model": {"name": name, "pretrained": args.model}, "text_tokens": args.text_tokens}
    config |= {"settings": [list(setting) for setting in settings], "sparsevlm": sparsevlm.__version__}
    config["parts"] = list(PARTS)  # how the work is booked
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    folder = RunFolder(args.results, f"{FLOPS}__{name}__{digest}")
    if folder.finished:
        return f"already there: {folder.path}"
    folder.open()
    rows = []
    for (method, budget), options in tqdm(built.items(), desc="settings", disable=None):
        found = count(args.model, method, budget, args.text_tokens)
        chosen = {k: v for k, v in asdict(options).items() if k != "budget"}
        rows.append({"method": method, "budget": budget, "options": chosen, "text_tokens": args.text_tokens,
                     "entering": found.entering, "leaving": found.leaving, "gmacs": found.gmacs,
                     "prefill_gmacs": prefill_gmacs(found.gmacs)})  # fmt: skip
    about = {"versions": environment.versions(), "hardware": environment.hardware(), "git": environment.git()}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    metrics = {"schema": SCHEMA, "task": FLOPS, "model": name, "config_hash": digest, "n": len(rows), "rows": rows}
    folder.publish({
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        "samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "env.json": json.dumps({"command": command, **about, "packages": environment.packages()}, indent=2) + "\n",
        "metrics.json": json.dumps({**metrics, **about}, indent=2) + "\n",
    })  # fmt: skip
    return str(folder.path)


if __name__ == "__main__":
    main()
