"""Measuring what was not measured before, and keeping it as a run folder."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.errors import UserError, one_line
from eval.runs.reader import BadRun
from eval.runs.writer import RunFolder, run_files


@dataclass(frozen=True)
class Measured:
    """The outcome of a measurement.

    Attributes:
        rows: for metrics.json.
        samples: for samples.jsonl, of which the rows are made.
        n: how many rounds, questions or settings were measured.
        config: what is known after measuring only, for config.yaml.
    """

    rows: Sequence[Mapping]
    samples: Sequence[Mapping]
    n: int
    config: Mapping = field(default_factory=dict)


def measure_once(
    results: Path, kind: str, name: str, config: Mapping, command: str, measure: Callable[[], Measured], *on: object
) -> tuple[RunFolder, bool]:
    """Measure and write `<results>/runs/<name>__<hash of config>/`, unless this folder is there.

    Args:
        results: folder that holds runs/.
        kind: "task" of metrics.json.
        name: how the folder's name begins.
        config: all that the rows depend on; for config.yaml.
        command: how the measurement was started, for env.json.
        measure: called if there is something to do, after the folder was found to be writable.
        on: what else the rows depend on: it goes into the hash, and not into config.yaml.

    Returns:
        The folder, and whether it was made now.

    Raises:
        UserError: the folder cannot be written.
    """
    identity = json.dumps([config, *on] if on else config, sort_keys=True, default=list)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    folder = RunFolder(results, f"{name}__{digest}")
    if folder.finished:
        return folder, False
    folder.open()
    found = measure()
    metrics = {"task": kind, "model": config.get("model", {"name": "mini"})["name"], "config_hash": digest}
    metrics |= {"n": found.n, "rows": found.rows, "seed": 0}
    config = {**config, **found.config}
    folder.publish(run_files(config, metrics, found.samples, command, folder.git()))
    return folder, True


def said(folder: RunFolder, made: bool) -> str:
    """Return the line that a command prints about its folder."""
    return str(folder.path) if made else f"already there: {folder.path}"


def command_of(name: str, argv: Sequence[str] | None) -> str:
    """Return how `python -m eval.measure.<name>` was started, for env.json."""
    return shlex.join(["python", "-m", f"eval.measure.{name}", *(sys.argv[1:] if argv is None else argv)])


def print_result(name: str, do: Callable[[], str]) -> None:
    """Print what `do` returns; one line on stderr and exit status 2 for what cannot be done."""
    try:
        print(do())
    except (UserError, BadRun, ValueError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
