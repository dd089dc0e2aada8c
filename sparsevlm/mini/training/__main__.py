"""Trains the embedded model from nothing: ``python -m sparsevlm.mini.training --out DIR --minutes 90``.

Writes ``DIR/model`` (a hub folder, for ``sparsevlm.load("DIR/model")``), ``DIR/learning_curve.json`` (loss and test
accuracy as training went on) and ``DIR/checkpoint.pt`` (to continue with ``--resume``).
"""

import argparse
import sys
from pathlib import Path

import torch

from sparsevlm.mini.training.hub import export
from sparsevlm.mini.training.plan import Settings
from sparsevlm.mini.training.run import TrainingRun


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsevlm.mini.training", description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--minutes",
        type=float,
        help="length of the training; 90 or more make a useful model on a CPU, below 20 only small windows are learnt",
    )
    length.add_argument("--steps", type=int, help="length in optimiser steps: repeatable number by number")
    parser.add_argument("--initial", type=Path, help="model folder to go on from (questions only), not from nothing")
    parser.add_argument("--video", action="store_true", help="train the video model; needs --initial")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the layers"
    )
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or begin it if there is none")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--workers", type=int, help="processes that draw scenes (default: 0 on a CPU, 8 beside a GPU)")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(options.seed, options.minutes, options.steps, options.precision, options.video)
        if (options.out / "checkpoint.pt").exists() and not options.resume:
            raise ValueError(f"{options.out} holds a run already: --resume continues it, or name another folder")
        device = _device(options.device)
        workers = options.workers if options.workers is not None else 0 if device.type == "cpu" else 8
        run = TrainingRun(options.out, settings, device, workers, initial=options.initial, compiled=options.compile)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run.state.total_steps:
        print(f"continuing at step {run.state.total_steps}, {run.progress:.0%} done")
    run.train()
    if run.processes.first:
        print(f"model: {export(run.model, options.out / 'model')}")
    run.processes.close()
    return 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available here; use --device cpu")
    return device


if __name__ == "__main__":
    sys.exit(main())
