"""Evaluate a model under a pruning method on a task.

    python -m eval.run model=mini method=sparsevlm budget=192 task=minivqa limit=64 results_dir=results
    python -m eval.run -m method=none,random,sparsevlm budget=192,128,64 task=minivqa
    python -m eval.run experiment=reproduce
    accelerate-launch --multi_gpu --num_processes 4 -m eval.run ...                 several GPUs on each run
    python -m eval.run -m hydra/launcher=joblib hydra.launcher.n_jobs=2 ...         jobs side by side on this machine
    python -m eval.run -m hydra/launcher=slurm hydra.launcher.partition=gpu ...     each job to Slurm

Exit status: 0 all runs are finished, with every question answered and scored; 1 a run failed; 2 the request is
invalid; 3 all runs are finished, but questions that failed are excluded (on_error=record); 4 all runs are finished, but
without the metrics of a language model that is not set or failed; 130 interrupted. Rerun the same command to resume an
interrupted or failed run. SPARSEVLM_TRACEBACK=1 prints tracebacks.

A job is one combination of the values that are swept over. Jobs that differ only in the method share pictures, prompts
and visual features, unless a launcher runs them in processes of their own; there, give each job an `experiment` with
many runs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin halve a shared machine

import itertools
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.errors import UserError, report, worst
from eval.measure.latency import time_runs
from eval.processes import is_first
from eval.runs.configs import CONFIGS, explain
from eval.runs.series import run_series
from eval.runs.settings import RunSettings, make_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the evaluations that the command line asks for; return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing and exiting with its own status
    command = shlex.join(["python", "-m", "eval.run", *arguments])
    here: list[tuple[list[RunSettings], dict | None]] = []  # runs and latency options of the jobs in this process
    statuses: list[int] = []

    def job(config: DictConfig) -> None:  # never raises, so that the other jobs of a multirun run
        launched = not HydraConfig.get().launcher._target_.endswith("BasicLauncher")
        try:
            runs, latency = _asked_for(OmegaConf.to_container(config, resolve=True))
            if launched:  # this job has its own process
                _write_status(_do([(runs, latency)], command))
            else:
                here.append((runs, latency))
        except Exception as error:
            several = HydraConfig.get().mode == RunMode.MULTIRUN
            which = " ".join(HydraConfig.get().overrides.task) + ": " if several else ""
            statuses.append(report(error, which, shown=is_first()))
            if launched:
                _write_status(statuses[-1])

    with _sweep_folder(arguments) as folder:
        own_argv, sys.argv = sys.argv, [sys.argv[0], *arguments, f"hydra.sweep.dir='{folder}'"]
        try:
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
            if here:
                statuses.append(_do(here, command))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return report(UserError(explain(error, arguments)), shown=is_first())
        except KeyboardInterrupt:
            return 130
        except Exception as error:  # a launcher lost a job
            statuses.append(report(error, f"a job was lost (logs: {folder}): "))
        finally:
            sys.argv = own_argv
        return worst([*statuses, *_read_statuses(folder)])


def _asked_for(config: dict) -> tuple[list[RunSettings], dict | None]:
    """Return the runs of one job, and the options of its latency measurement."""
    experiment = config.pop("experiment") or {}
    runs = _listed(experiment["runs"]) if experiment else [_one(config)]
    return runs, experiment.get("latency")


def _do(jobs: Sequence[tuple[list[RunSettings], dict | None]], command: str) -> int:
    """Execute the runs of all jobs, then the latency measurements if nothing failed."""
    status = run_series([run for runs, _ in jobs for run in runs], command)
    to_time = [(runs, latency) for runs, latency in jobs if latency and status == 0 and is_first()]
    timed = [time_runs(runs, command=command, **latency) for runs, latency in to_time]
    return worst([status, *timed])


@contextmanager
def _sweep_folder(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the folder for Hydra's files in a multirun: a temporary one, or for launchers <results_dir>/jobs/<time>."""
    if not any(a.startswith("hydra/launcher=") for a in arguments):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    results = [a.partition("=")[2] for a in arguments if a.startswith("results_dir=")] or ["results"]
    folder = Path(results[-1].strip("'\"")).expanduser().resolve() / "jobs" / f"{datetime.now():%Y%m%d_%H%M%S}"
    yield folder


def _write_status(status: int) -> None:
    """Write this job's exit status for the process that launched it."""
    config = HydraConfig.get()
    path = Path(config.sweep.dir, f"{config.job.num}.status.json")
    path.write_text(json.dumps({"status": status, "job": " ".join(config.overrides.task)}) + "\n")


def _read_statuses(folder: Path) -> list[int]:
    """Return the exit statuses of the launched jobs; print those that failed."""
    ended = [json.loads(path.read_text()) for path in sorted(folder.glob("*.status.json"))]
    for job in ended:
        if job["status"]:
            print(f"job {job['job']} ended with status {job['status']}; logs: {folder}", file=sys.stderr, flush=True)
    return [job["status"] for job in ended]


def _listed(entries: Sequence[dict]) -> list[RunSettings]:
    """Make the runs that an experiment lists: each entry is one run, or one for each combination of its lists.

    Raises:
        UserError: an entry is wrong, or the command line sets what the experiment sets; raised before any run starts.
    """
    given = list(HydraConfig.get().overrides.task)
    fixed = {key for entry in entries for key in entry}
    for key in (override.split("=")[0] for override in given):
        if key in fixed:
            raise UserError(f"this experiment sets {key} itself. Leave {key}=... out")
    runs = []
    for entry in entries:
        choices = [v if isinstance(v, list) else [v] for v in entry.values()]
        for values in itertools.product(*choices):
            own = [f"{k}={'null' if v is None else v}" for k, v in zip(entry, values, strict=True)]
            try:
                composed = OmegaConf.to_container(hydra.compose("config", [*given, *own]), resolve=True)
            except (HydraException, OmegaConfBaseException) as error:
                raise UserError(
                    f"in the experiment's entry {' '.join(own)}: {explain(error, [*given, *own])}"
                ) from error
            composed.pop("experiment")
            runs.append(_one(composed))
    return runs


def _one(config: dict) -> RunSettings:
    run = make_run(config)
    if config["budget"] not in (None, run.budget) and is_first():
        print(f"ignoring budget={config['budget']}: method={run.method.name} keeps all tokens", flush=True)
    return run


if __name__ == "__main__":
    sys.exit(main())
