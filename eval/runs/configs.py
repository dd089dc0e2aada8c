"""The configuration files, the config group `task`, and why Hydra refuses a command line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from eval.errors import one_line, unknown
from eval.tasks import TASKS, unknown_task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

for _task in TASKS.values():  # a task's options and their defaults are declared with the task
    ConfigStore.instance().store(group="task", name=_task.name, node=_task.config)


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Say in one line why Hydra refused a command line, with the nearest known name.

    The arguments are examined with Hydra's own parser and choices. Hydra's message is used where that finds nothing.

    Args:
        error: what Hydra raised.
        arguments: of the command line, flags included.
    """
    multirun = bool({"-m", "--multirun"} & set(arguments))
    overrides = []
    for argument in (a for a in arguments if not a.startswith("-")):
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            return f"cannot read the argument {argument!r}. Use key=value, for example limit=100"
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = itertools.chain(
            _several_values([] if multirun else overrides), _unknown_choices(overrides), _unknown_keys(overrides)
        )
        return next(found, one_line(error))


def _several_values(overrides: Sequence[Override]) -> Iterator[str]:
    for override in overrides:
        if override.is_sweep_override():
            yield f"{override.input_line} lists several values. Use -m before it to run each of them"


def _unknown_choices(overrides: Sequence[Override]) -> Iterator[str]:
    for override in overrides:
        group = override.key_or_group
        known = choices(group)
        for name in _values(override) if known else []:
            if name is None or name in known:
                continue
            if group == "hydra/launcher":
                extra = "joblib, slurm and submitit_local come with pip install 'sparsevlm-bench[sweep]'"
                yield f"unknown launcher {name!r}. Known: {', '.join(known)}; {extra}"
            yield unknown_task(name) if group == "task" else unknown(group, name, known)


def _unknown_keys(overrides: Sequence[Override]) -> Iterator[str]:
    """Look for each key in the configuration of each combination of groups."""
    groups = {o.key_or_group: _values(o) for o in overrides if choices(o.key_or_group) and not _of_hydra(o)}
    for names in itertools.product(*groups.values()):
        chosen = [f"{k}={'null' if v is None else v}" for k, v in zip(groups, names, strict=True)]
        keys = list(_keys(OmegaConf.to_container(hydra.compose("config", chosen))))
        for override in overrides:
            key = override.key_or_group
            if key in keys or key in groups or override.is_add() or _of_hydra(override):
                continue
            parent = key.rpartition(".")[0]
            elsewhere = [k for k in keys if k.rpartition(".")[2] == key]
            beside = [k for k in keys if k.rpartition(".")[0] == parent]
            yield unknown("config key", key, elsewhere or beside or keys)


def choices(group: str) -> list[str]:
    """Return the names that a config group offers; empty for what is no group."""
    return [name for name in _loader().get_group_options(group) if not name.startswith("_")]


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _of_hydra(override: Override) -> bool:
    return override.key_or_group.partition(".")[0].partition("/")[0] == "hydra"


def _values(override: Override) -> list[object]:
    """Return the value of an override, or those that it sweeps over."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value() or None]


def _keys(config: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
