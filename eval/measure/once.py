"""What the commands of this folder share: measure what was not measured before, and keep it as a run folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.errors import UserError, one_line
from eval.jsonl import JsonLines, read_rows
from eval.runs import environment
from eval.runs.reader import BadRun
from eval.runs.writer import RunFolder, run_files


class Kept:
    """Values that an interrupted measurement has already, by key; those of other code or versions do not count.

    Args:
        path: file of the unfinished run's folder, of one process at a time.

    Raises:
        BlockingIOError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._by = [environment.git_at_start(), environment.versions()]
        self._file = JsonLines(path)
        self._values = {_key(row["key"]): row["value"] for row in read_rows(path) if row.get("by") == self._by}

    def items(self) -> list[tuple[list, object]]:
        """Return keys and values in the order in which they came."""
        return [(json.loads(key), value) for key, value in self._values.items()]

    def __contains__(self, key: Sequence) -> bool:
        return _key(key) in self._values

    def __getitem__(self, key: Sequence) -> object:
        return self._values[_key(key)]

    def add(self, values: Sequence[tuple[Sequence, object]]) -> None:
        """Write (key, value) pairs; return when they are on disk."""
        self._file.append({"by": self._by, "key": list(key), "value": value} for key, value in values)
        self._values |= {_key(key): value for key, value in values}

    def close(self) -> None:
        self._file.close()


def _key(key: Sequence) -> str:
    return json.dumps(list(key), sort_keys=True, default=list)


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


def folder_of(results: Path, name: str, config: Mapping, *on: object) -> RunFolder:
    """Return the folder of a measurement; see :func:`measure_once`."""
    identity = json.dumps([config, *on] if on else config, sort_keys=True, default=list)
    return RunFolder(results, f"{name}__{hashlib.sha256(identity.encode()).hexdigest()[:8]}")


def measure_once(
    results: Path,
    kind: str,
    name: str,
    config: Mapping,
    command: str,
    measure: Callable[[Kept], Measured],
    *on: object,
) -> str:
    """Measure and write `<results>/runs/<name>__<hash of config>/`, unless this folder is there.

    Args:
        results: folder that holds runs/.
        kind: "task" of metrics.json.
        name: how the folder's name begins.
        config: all that the rows depend on; for config.yaml.
        command: how the measurement was started, for env.json.
        measure: called with what an interrupted attempt kept, after the folder was found to be writable.
        on: what else the rows depend on: it goes into the hash, and not into config.yaml.

    Returns:
        The line that a command prints about its folder.

    Raises:
        UserError: the folder cannot be written.
        BlockingIOError: another process measures the same.
    """
    folder = folder_of(results, name, config, *on)
    if folder.finished:
        return f"already there: {folder.path}"
    folder.open()
    kept = Kept(folder.ledger)
    try:
        found = measure(kept)
    finally:
        kept.close()
    metrics = {
        "task": kind,
        "model": config.get("model", {"name": "mini"})["name"],
        "config_hash": folder.path.name.rpartition("__")[2],
    }
    metrics |= {"n": found.n, "rows": found.rows, "seed": 0}
    config = {**config, **found.config}
    folder.publish(run_files(config, metrics, found.samples, command, folder.git()))
    return str(folder.path)


def run_command(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace, str], str],
    argv: Sequence[str] | None,
) -> None:
    """Be the command `python -m eval.measure.<name>`: parse, measure, print what was made.

    Exit status 2 with one line on stderr for what cannot be done, 130 after an interruption.

    Args:
        description: docstring of the module; its first line is shown by --help.
        add_arguments: adds the command's own arguments beside --results.
        measure: (arguments, command line for env.json) -> what to print.
        argv: arguments; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m eval.measure.{name}", description=description.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    add_arguments(parser)
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", f"eval.measure.{name}", *(sys.argv[1:] if argv is None else argv)])
    try:
        print(measure(args, command))
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted. Rerun the same command to resume", file=sys.stderr)
        sys.exit(130)
    except (UserError, BadRun, ValueError, MemoryError, ImportError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
