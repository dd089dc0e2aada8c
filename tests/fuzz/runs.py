"""Random command lines through `eval.run`: each ends in complete results or in one clear line.

    python -m tests.fuzz.runs --cases 200 --seed 0      # 200 command lines; those that fail are printed, made small

A case is the overrides of one command, valid and invalid values mixed, run in this process with the embedded model in a
folder of its own. `wrong` says what the command did that it must not:

* a status that is not documented in eval/run.py, an exception that leaves `main`, or a traceback;
* status 0 without a finished folder whose files agree with each other, with the limit and with the budget;
* any other status without exactly one line `error: ...`, or with a Python exception's name in it instead of words;
* anything left under a finished run's name by a command that failed.
"""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from eval.run import CONFIGS
from eval.run import main as eval_run
from eval.runs.settings import ModelSettings

N_VISUAL, SECONDS = 576, 120
#: What a user cannot act on: the names of Python's own exceptions, as they come when a value was not checked.
RAW = re.compile(
    r"\b(KeyError|TypeError|AttributeError|IndexError|NameError|AssertionError|UnboundLocalError|ZeroDivisionError|"
    r"OverflowError|RecursionError|UnicodeDecodeError|UnicodeEncodeError|ValueError|JSONDecodeError|NotImplementedError"
    r"|StopIteration|RuntimeError)\b|Traceback|object has no attribute|NoneType|positional argument"
)
JUNK = (
    "0", "-1", "1", "2", "3", "5", "-0", "2.5", "1e3", "1e400", "inf", "-inf", "nan", "9" * 20, "0x10",
    "1_0", "true", "false", "null", "none", "''", "' '", "abc", "[]", "[1,2]", "[1,2,3]", "[null]", "{}", "{a:1}",
    "é", "'漢字'", "'😀'", "'two words'", "???", "'???'", "full",
    "'1'", "'192'", "auto", "../..", "/dev/null", ".", "cpu", "cuda", "cuda:99", "'a=b'", "'a:b'", "'%s'", "'{}'",
    "'a\\nb'", "1,2", "a,b", "range(1,3)", "choice(1,2)", "'\\'", "x[", "(", "@", "!", "-", "=", "~", "'",
)  # fmt: skip
GOOD = {
    "limit": ("1", "2", "3"), "batch_size": ("1", "2", "8"), "max_new_tokens": ("1", "4", "null"),
    "on_error": ("stop", "record"), "feature_mb": ("0", "16"), "results_dir": ("results", "a/b", "'with space'", "ünï"),
    "budget": ("16", "64", "100", "192", "576", "full", "null", "1", "575"),
    "model": ("mini",), "task": ("minivqa",), "task.seed": ("0", "1", "4294967295"),
    "model.dtype": ("float32", "bfloat16", "float16", "auto", "null"), "model.device": ("auto", "cpu"),
    "model.attn_implementation": ("sdpa", "eager"), "model.image_aspect_ratio": ("crop", "pad"),
    "model.prompt": ("hub",), "model.pretrained": ("mini",),
}  # fmt: skip
#: Values that stop a command before it runs, and what they name must be said; written as paths of the case's folder.
PLACES = ("file", "file/below", "readonly", "/proc/nowhere", "/dev/full", "''", "~nobody/x", "a" * 300)
STATUSES = (0, 1, 2, 3, 4, 130)


class Failed(AssertionError):
    """A command did what it must not."""


class TooLong(BaseException):
    """A command took longer than any of these may."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status, stdout, stderr, and what left `main` if anything did."""

    status: int | None
    out: str
    err: str
    raised: str | None = None

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def command(arguments: Sequence[str], seconds: int = SECONDS) -> Ended:
    """Run `python -m eval.run` with these arguments in this process."""
    out, err, raised, status = io.StringIO(), io.StringIO(), None, None
    before = signal.signal(signal.SIGALRM, _too_long)
    terminate = signal.getsignal(signal.SIGTERM)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = eval_run(list(arguments))
    except SystemExit as stopped:  # of argparse
        status = stopped.code
    except BaseException as error:
        raised = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGTERM, terminate)
    return Ended(status, out.getvalue(), err.getvalue(), raised)


def _too_long(*_) -> None:
    raise TooLong(f"no end after {SECONDS} s")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty current folder, removed afterwards."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="runs-") as folder:
        Path(folder, "file").write_text("not a folder")
        Path(folder, "readonly").mkdir()
        os.chmod(Path(folder, "readonly"), 0o555)
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def finished(folder: Path) -> list[Path]:
    """All run folders that have a name of a finished run, whatever is in them."""
    return sorted(p for p in folder.rglob("runs/*") if not p.name.startswith("."))


def check_folder(run: Path, limit: int | None = None) -> None:
    """See that the files of a finished run agree with each other, with the limit and with the budget."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    n = metrics["n"]
    assert n == len(samples) == len({s["doc_id"] for s in samples}) and n > 0, f"n is {n} of {len(samples)} samples"
    assert n + metrics["excluded"] == config["limit"], f"{n} questions of a limit of {config['limit']}"
    assert limit is None or config["limit"] == limit, f"limit {config['limit']}, asked for {limit}"
    for name in ("visual", "entering", "leaving"):
        mean = math.fsum(s[name] for s in samples) / n
        assert math.isclose(mean, metrics["tokens"][name], abs_tol=1e-9), f"tokens.{name} is no mean of the samples"
    budget, leaving = metrics["budget"], metrics["tokens"]["leaving"]
    expected = {"full": metrics["tokens"]["visual"], "explicit": leaving}.get(budget, budget)
    if metrics["method"] == "downsample" and isinstance(budget, int) and budget < N_VISUAL:
        expected = math.isqrt(budget) ** 2  # squares only, as the method says
    assert abs(leaving - expected) <= 0.5, f"{leaving} tokens at a budget of {budget}"
    for name, metric in metrics["metrics"].items():
        scores = [s["scores"][name] for s in samples if name in s["scores"]]
        if name.startswith("accuracy/"):
            kind = name.removeprefix("accuracy/")
            scores = [s["scores"]["accuracy"] for s in samples if s["question_type"] == kind]
        assert scores and math.isclose(math.fsum(scores) / len(scores), metric["value"]), (
            f"{name} is no mean of the samples"
        )


def wrong(arguments: Sequence[str], ended: Ended, folder: Path) -> str | None:
    """What a command did that it must not; None = all is well."""
    several = "-m" in arguments or any(a.startswith("experiment=") for a in arguments)
    if ended.raised is not None:
        return f"raised {ended.raised}"
    if ended.status not in STATUSES:
        return f"ended with status {ended.status!r}"
    if "Traceback" in ended.out + ended.err:
        return "showed a traceback"
    runs = finished(folder)
    try:
        for run in runs:
            check_folder(run)
    except (AssertionError, OSError, ValueError, KeyError) as error:
        return f"left a wrong run: {type(error).__name__}: {error}"
    if ended.status == 0:
        if not runs or ended.errors:
            return f"succeeded with {len(runs)} runs and {ended.errors}"
        if left := [p.name for p in folder.rglob("runs/.*")]:
            return f"succeeded, but left {left}"
        return None
    if runs and not several and ended.status not in (3, 4):
        return f"failed, but left {runs[0].name}"
    if ended.status in (1, 2) and (not ended.errors or (len(ended.errors) > 1 and not several)):
        return f"told {len(ended.errors)} errors: {ended.err!r}"
    if extra := [line for line in ended.err.splitlines() if not line.startswith(("error: ", "warning: "))]:
        if not any("q/s" in line or "|" in line for line in extra):
            return f"said more than one line: {extra[:5]}"
    return next((f"named an exception: {line}" for line in ended.errors if RAW.search(line)), None)


# ---- command lines -------------------------------------------------------------------------------------------------
def _options(method: str) -> list[str]:
    """Keys of configs/method/<method>.yaml."""
    return [f"method.{key}" for key in yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())][1:]


METHODS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
MODEL = tuple(f"model.{field.name}" for field in fields(ModelSettings))
TOP = ("limit", "max_new_tokens", "batch_size", "on_error", "feature_mb", "results_dir", "budget", "model", "task")


def draw(number: int, seed: int) -> list[str]:
    """The arguments of one command; equal for equal numbers."""
    rng = random.Random(f"{seed} {number}")
    method = rng.choice(METHODS)
    arguments = {"method": method, "budget": rng.choice(GOOD["budget"]), "limit": rng.choice(GOOD["limit"])}
    arguments["max_new_tokens"] = "2"
    keys = [*TOP, *_options(method) * 2, *MODEL, "task.seed", "task.name", "method.name"]
    for key in rng.sample(keys, rng.choice((0, 1, 1, 1, 2, 3))):
        arguments[key] = _value(rng, key)
    words = [f"{key}={value}" for key, value in arguments.items()]
    if rng.random() < 0.15:
        words.append(rng.choice(_ODD)(rng))
    if rng.random() < 0.1:
        words = [w for w in words if not w.startswith("limit=")] + ["limit=1,2"]
        rng.shuffle(words)
        return ["-m", *words]
    rng.shuffle(words)
    return words


def _value(rng: random.Random, key: str) -> str:
    if key == "results_dir" and rng.random() < 0.7:
        return rng.choice(PLACES)
    if rng.random() < 0.4 and key in GOOD:
        return rng.choice(GOOD[key])
    value = rng.choice(JUNK)
    return "3" if key == "limit" and value in ("null", "9" * 20) else value  # these ask thousands of questions


_ODD: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: f"+{rng.choice(('new', 'limit', 'method.new', 'a.b.c', 'budget'))}={rng.choice(JUNK)}",
    lambda rng: f"++{rng.choice(('limit', 'method.name', 'model.name', 'task.name', 'new'))}={rng.choice(JUNK)}",
    lambda rng: f"~{rng.choice(('limit', 'method', 'model', 'method.name', 'task.seed', 'budget', 'nothing', 'task'))}",
    lambda rng: f"{rng.choice(('limt', 'buget', 'modle', 'method.nmae', 'task.sed', 'é', '', ' '))}={rng.choice(JUNK)}",
    lambda rng: rng.choice(JUNK),
    lambda rng: f"experiment={rng.choice(('nothing', 'null', 'reproduce', 'methods', 'mini_video', '3', '[a]'))}",
    lambda rng: f"hydra.{rng.choice(('run.dir', 'sweep.dir', 'nothing', 'job.name'))}={rng.choice(JUNK)}",
    lambda rng: f"method@{rng.choice(('x', 'model', ''))}={rng.choice(METHODS)}",
    lambda rng: f"{rng.choice(('model', 'task', 'method'))}={rng.choice(JUNK)}",
    lambda rng: f"hydra/launcher={rng.choice(('nothing', 'slurm', 'basic'))}",
)


def check(arguments: Sequence[str]) -> tuple[str | None, Ended]:
    """Run a command in a folder of its own: what was wrong with it, and how it ended."""
    with workplace() as folder:
        ended = command(arguments)
        return wrong(arguments, ended, folder), ended


def smaller(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that a failure does not need."""
    kept = list(arguments)
    for argument in arguments:
        fewer = [a for a in kept if a != argument]
        if not argument.startswith("limit=") and check(fewer)[0]:
            kept = fewer
    return kept


def fuzz(cases: int, seed: int, start: int = 0) -> tuple[Counter, list[tuple[list[str], str]]]:
    """Run command lines; returns how they ended, and those that went wrong with what was wrong."""
    tally, failures = Counter(), []
    for number in range(start, start + cases):
        arguments = draw(number, seed)
        fault, ended = check(arguments)
        tally[f"status {ended.status}"] += 1
        if fault:
            failures.append((arguments, fault))
    return tally, failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.runs", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100, help="how many command lines (100)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal cases")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--show", action="store_true", help="print how every command ended")
    o = parser.parse_args(arguments)
    tally, failed = Counter(), 0
    for number in range(o.start, o.start + o.cases):
        words = draw(number, o.seed)
        fault, ended = check(words)
        tally[f"status {ended.status}"] += 1
        if o.show:
            print(number, ended.status, words, "|", " ".join(ended.errors)[:300], flush=True)
        if fault:
            failed += 1
            print(f"FAILED case {number}: {fault}\n  python -m eval.run {words!r}", flush=True)
    print(f"{o.cases} command lines: {dict(sorted(tally.items()))}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
