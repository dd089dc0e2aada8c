"""Evaluate a model under a pruning method on a task.

    python -m eval.run model=mini method=sparsevlm budget=192 task=minivqa limit=64 results_dir=results
    python -m eval.run -m method=none,random,sparsevlm budget=192,128,64 task=minivqa
    python -m eval.run experiment=reproduce

Exit status: 0 every question was answered and scored (or had been); 1 a run failed; 2 something that was asked for
cannot be; 130 interrupted. An interrupted or failed run goes on where it was when the same command is given again.
SPARSEVLM_TRACEBACK=1 shows where an error came from.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin halve a shared machine

import itertools
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.errors import UserError, one_line, report, unknown, worst
from eval.series import run_series, time_runs
from eval.settings import Run, make_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_GROUPS = ("model", "method", "budget", "task", "experiment")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing and exiting with its own status
    command = shlex.join(["python", "-m", "eval.run", *arguments])
    statuses: list[int] = []

    def job(config: DictConfig) -> None:  # never raises: in a multirun the other jobs go on
        try:
            plain = OmegaConf.to_container(config, resolve=True)
            experiment = plain.pop("experiment") or {}
            runs = _listed(experiment["runs"]) if experiment else [_one(plain)]
            statuses.append(run_series(runs, command))
            if experiment.get("latency") and statuses[-1] == 0:
                statuses.append(time_runs(runs, **experiment["latency"]))
        except Exception as error:
            several = HydraConfig.get().mode == RunMode.MULTIRUN
            which = " ".join(HydraConfig.get().overrides.task) + ": " if several else ""
            statuses.append(report(error, which))

    with tempfile.TemporaryDirectory() as scratch:  # Hydra writes a file of its own in a multirun
        own_argv, sys.argv = sys.argv, [sys.argv[0], *register_budgets(arguments), f"hydra.sweep.dir='{scratch}'"]
        try:
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return report(UserError(_explain(error, arguments)))
        except KeyboardInterrupt:
            return 130
        finally:
            sys.argv = own_argv
    return worst(statuses)


def register_budgets(arguments: Sequence[str]) -> list[str]:
    """Make any number a choice of the group `budget`, as if configs/budget had a file for it.

    Hydra takes only strings as choices, so numbers are put in quotes. What is no number becomes a choice too: the
    check of budgets explains it better than Hydra would.
    """
    out = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "budget" or "(" in value:
            out.append(argument)
            continue
        names = [v.strip(" '\"") for v in value.split(",")]
        for name in names:
            if not (CONFIGS / "budget" / f"{name}.yaml").is_file():
                value = None if name == "null" else int(name) if re.fullmatch(r"-?\d+", name) else name
                ConfigStore.instance().store(group="budget", name=name, node={"budget": value}, package="_global_")
        out.append("budget=" + ",".join(f'"{name}"' for name in names))
    return out


def _listed(entries: Sequence[dict]) -> list[Run]:
    """The runs that an experiment lists: each entry is one run, or one for each combination of its lists.

    Raises:
        UserError: in any of them, before the first is started.
    """
    given = list(HydraConfig.get().overrides.task)
    fixed = {key for entry in entries for key in entry}
    for key in (override.split("=")[0] for override in given):
        if key in fixed:
            raise UserError(f"this experiment sets {key} itself; leave {key}=... out")
    runs = []
    for entry in entries:
        choices = [v if isinstance(v, list) else [v] for v in entry.values()]
        for values in itertools.product(*choices):
            own = register_budgets([f"{k}={v}" for k, v in zip(entry, values, strict=True)])
            composed = OmegaConf.to_container(hydra.compose("config", [*given, *own]), resolve=True)
            composed.pop("experiment")
            runs.append(_one(composed))
    return runs


def _one(config: dict) -> Run:
    run = make_run(config)
    if config["budget"] not in (None, run.budget):
        print(f"method={run.method.name} drops nothing: budget={config['budget']} counts as {run.budget}", flush=True)
    return run


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """What Hydra objects to, on one line and with the nearest known name."""
    text = one_line(error)
    if found := re.search(r"Could not find '(\w+)/(.*?)'", text):
        group, name = found.groups()
        return unknown(group, name, [p.stem for p in (CONFIGS / group).glob("*.yaml")])
    if found := re.search(r"Could not override '(.*?)'", text):
        group = found[1].rpartition(".")[0]
        return unknown("config key", found[1], [k for k in _keys(arguments) if k.rpartition(".")[0] == group])
    return text


def _keys(arguments: Sequence[str]) -> list[str]:
    """All config keys that exist for the chosen groups (of those swept over, for the default)."""
    chosen = [a for a in register_budgets(arguments) if a.split("=")[0] in _GROUPS and "," not in a]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("config", chosen))
    return [*composed, *(f"{g}.{k}" for g, v in composed.items() if isinstance(v, dict) for k in v)]


if __name__ == "__main__":
    sys.exit(main())
