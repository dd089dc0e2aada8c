"""Time prefill and decode of several settings in one process and keep the result as a run folder.

    python scripts/profile.py --results results                         # what was run on `mini`, at its prompt length
    python scripts/profile.py none:full sparsevlm:192 sparsevlm:64:raters=all --text-tokens 60 --batch-size 4

Writes `<results>/runs/latency__<model>__<config hash>/`. The hash covers the machine, so each machine has its own
folder; the same command again on the same machine finds it and measures nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

if not __package__:  # started as a file: this folder must go anyway, a `profile` in it hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
import yaml
from tqdm import tqdm

from eval import environment
from eval.errors import UserError, one_line
from eval.results import RunFolder
from eval.settings import fingerprint
from scripts.runs import LATENCY, ROWS_ONLY, SCHEMA, BadRun, Run, read_runs, setting_key
from sparsevlm.cost.latency import UNPRUNED, Setting, measure
from sparsevlm.models.checkpoint import find_checkpoint


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""
    args = _parser().parse_args(argv)
    try:
        print(profile(args, shlex.join(["python", "scripts/profile.py", *(sys.argv[1:] if argv is None else argv)])))
    except (UserError, BadRun, ValueError, OSError) as error:
        print(f"profile: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "settings",
        nargs="*",
        help="method:budget[:option=value...]; default: those that runs of the model were made at",
    )
    parser.add_argument("--model", default="mini", help="as in the runs' names, or any name for sparsevlm.load")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--text-tokens", type=int, help="non-visual tokens (default: as in the runs of the model)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them")
    parser.add_argument("--decode-tokens", type=int, default=8, help="decode steps per round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32, float16, bfloat16, auto (default: float32 on a CPU, else auto)")
    return parser


def profile(args: argparse.Namespace, command: str) -> str:
    """Measure what `args` ask for, unless that was done on this machine, and say where the result is.

    Raises:
        UserError, BadRun, ValueError, OSError: settings, model or folders that cannot be used.
    """
    runs = [r for r in _existing(args.results) if r.model == args.model and r.task not in ROWS_ONLY]
    settings = [parse_setting(text) for text in args.settings] or settings_of(runs)
    text_tokens = args.text_tokens or text_tokens_of(runs)
    if not settings or not text_tokens:
        raise UserError(
            f"no runs of the model {args.model} in {args.results}/runs to take settings and prompt length from: give "
            "settings such as none:full sparsevlm:192, and --text-tokens"
        )
    if not any(method == "none" for method, _, _ in settings):
        settings.insert(0, UNPRUNED)
    pretrained = runs[0].config["model"]["pretrained"] if runs else args.model
    checkpoint = find_checkpoint(pretrained)
    config = {
        "model": {"name": args.model, "pretrained": pretrained, "weights": fingerprint(checkpoint)},
        "settings": [_full(setting) for setting in settings],
        "text_tokens": text_tokens,
        **{k: getattr(args, k) for k in ("batch_size", "repeats", "warmup", "decode_tokens", "device", "dtype")},
    }
    identity = json.dumps([config, environment.hardware()], sort_keys=True, default=list)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    folder = RunFolder(args.results, f"{LATENCY}__{args.model}__{digest}")
    if folder.finished:
        return f"already there: {folder.path}"
    folder.open()
    model, _ = sparsevlm.load(pretrained, device=args.device, dtype=args.dtype)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    with tqdm(desc="rounds", total=args.warmup + args.repeats, mininterval=1) as bar:
        rows = measure(
            model, settings, text_tokens, args.batch_size, args.repeats, args.warmup, args.decode_tokens,
            progress=lambda done, total: bar.update(),
        )  # fmt: skip
    folder.publish(_files(config, rows, digest, args.repeats, command))
    return str(folder.path)


def _existing(results: Path) -> list[Run]:
    return read_runs(results) if (results / "runs").is_dir() and any((results / "runs").iterdir()) else []


def parse_setting(text: str) -> Setting:
    """ "sparsevlm:64:raters=all" -> ("sparsevlm", 64, {"raters": "all"}); values are YAML.

    Raises:
        UserError: not of this form, or no such method, option or value.
    """
    method, _, rest = text.partition(":")
    budget, *options = rest.split(":") if rest else [""]
    pairs = [option.partition("=") for option in options]
    if any(not key or not equals for key, equals, _ in pairs):
        raise UserError(f"setting {text!r} is not method:budget[:option=value...]; write for example sparsevlm:64")
    setting = method, yaml.safe_load(budget), {key: yaml.safe_load(value) for key, _, value in pairs}
    try:
        _full(setting)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return setting


def settings_of(runs: list[Run]) -> list[Setting]:
    """The settings of accuracy runs, each once, in the order of the folders."""
    found = {}
    for run in runs:
        m = run.metrics
        found[run.setting] = m["method"], None if m["budget"] == "explicit" else m["budget"], m["options"]
    return list(found.values())


def text_tokens_of(runs: list[Run]) -> int | None:
    """The median over runs of the prompt length at which their multiply-adds were counted."""
    lengths = [run.metrics["cost"]["text_tokens"] for run in runs]
    return statistics.median_low(lengths) if lengths else None


def _full(setting: Setting) -> dict:
    """A setting with all options and the budget's name, as in metrics.json."""
    name, budget, options = setting
    chosen = asdict(sparsevlm.build(name, budget=budget, **options))
    return {"method": name, "budget": _budget_name(chosen.pop("budget")), "options": chosen}


def _budget_name(budget: int | str | None) -> int | str:
    return "explicit" if budget is None else budget


def _files(config: dict, rows: list[dict], digest: str, rounds: int, command: str) -> dict[str, str]:
    """The contents of the run folder; samples.jsonl has one line per round and setting."""
    samples = []
    for row in rows:
        row["budget"] = _budget_name(row["budget"])
        key = setting_key(row["method"], row["options"], row["budget"])
        times = row.pop("rounds")
        for i in range(rounds):
            samples.append(json.dumps({"round": i, "setting": key, **{k: v[i] for k, v in times.items()}}) + "\n")
    about = {"versions": environment.versions(), "hardware": environment.hardware(), "git": environment.git()}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    metrics = {
        "schema": SCHEMA,
        "task": LATENCY,
        "model": config["model"]["name"],
        "config_hash": digest,
        "n": rounds,
        "rows": rows,
        "seed": 0,
        **about,
    }
    plain = json.loads(json.dumps(config))  # tuples -> lists
    return {
        "config.yaml": yaml.safe_dump(plain, sort_keys=False),
        "samples.jsonl": "".join(samples),
        "env.json": json.dumps({"command": command, **about, "packages": environment.packages()}, indent=2) + "\n",
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
    }


if __name__ == "__main__":
    main()
