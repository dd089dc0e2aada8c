"""One or several runs, one after the other: what is there already is skipped, what fails does not stop the others."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from eval.errors import UserError, report, worst
from eval.results import RunFolder
from eval.settings import Run
from eval.tasks import TASKS

_ROOT = Path(__file__).resolve().parents[1]


def run_series(runs: Sequence[Run], command: str) -> int:
    """Do all runs that have no finished folder yet, with one progress bar over all their questions.

    Args:
        command: how they were started, for env.json.

    Returns:
        The exit status: 0 if all have a finished folder now.

    Raises:
        UserError: results cannot be written, or the model cannot be loaded; the rest is not tried.
    """
    pending = []
    for run in runs:
        folder = RunFolder(run.results_dir, run.run_id())
        if folder.finished:
            print(f"already there: {folder.path}", flush=True)
        else:
            pending.append((run, folder))
    if not pending:
        return 0
    from eval.evaluate import execute

    statuses = []
    bar = _Bar(sum(TASKS[run.task.name].questions(run.limit) for run, _ in pending))
    for i, (run, folder) in enumerate(pending, 1):
        bar.title = f"run {i} of {len(pending)}: {run.label}"
        try:
            execute(run, folder, command, bar)
            tqdm.write(f"{run.label}: {_summary(folder)}", file=sys.stdout)
            statuses.append(0)
        except UserError:
            bar.close()
            raise
        except KeyboardInterrupt:
            bar.close()
            print(f"interrupted: {_kept(folder)}", file=sys.stderr, flush=True)
            raise
        except Exception as error:
            bar.close()
            statuses.append(report(error, f"{folder.path.name} failed; {_kept(folder)}: "))
    bar.close()
    return worst(statuses)


def time_runs(runs: Sequence[Run], repeats: int, warmup: int) -> int:
    """Measure the latency of the settings of all runs with scripts/profile.py, at their median prompt length.

    Returns:
        The exit status; 0 also if it had been measured on this machine before.
    """
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))  # scripts/ is no installed package
    from scripts.profile import main

    first = runs[0]
    lengths = [
        json.loads((RunFolder(run.results_dir, run.run_id()).path / "metrics.json").read_text())["cost"]["text_tokens"]
        for run in runs
    ]
    arguments = ["--model", first.model.name, "--results", str(first.results_dir)]
    arguments += ["--text-tokens", str(statistics.median_low(lengths)), "--repeats", str(repeats)]
    arguments += ["--warmup", str(warmup), "--device", first.model.device, "--dtype", first.model.dtype]
    settings = [":".join([r.method.name, str(r.budget), *(f"{k}={json.dumps(v)}" for k, v in r.changed)]) for r in runs]
    try:
        main([*settings, *arguments])
    except SystemExit as stopped:  # it has said why
        return int(stopped.code or 0)
    return 0


class _Bar:
    """Progress over all questions of all runs; appears with the first answer, after whatever can be wrong."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.title = total, 0, ""
        self._bar: tqdm | None = None

    def __call__(self, answered: int) -> None:
        if self._bar is None:
            interval = 0.1 if sys.stderr.isatty() else 15  # a log file gets a line now and then
            self._bar = tqdm(
                total=self.total, initial=self.done, unit="q", mininterval=interval, file=sys.stderr, dynamic_ncols=True
            )
        self.done += answered
        self._bar.set_description(self.title, refresh=False)
        self._bar.update(answered)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _kept(folder: RunFolder) -> str:
    return f"{folder.answers_kept()} answers are kept, the same command goes on from there"


def _summary(folder: RunFolder) -> str:
    metrics = json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    found, tokens = metrics["metrics"], metrics["tokens"]
    main = "accuracy" if "accuracy" in found else next(iter(found))
    interval = found[main]["ci95"]
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    averages = f"visual tokens per layer {tokens['entering']:.1f} entering, {tokens['leaving']:.1f} leaving"
    return f"{main} {found[main]['value']:.3f}{spread}, {averages} -> {folder.path}"
