"""One or several runs, one after the other: what is there already is skipped, what fails does not stop the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from eval.errors import UserError, report, worst
from eval.results import RunFolder
from eval.settings import Run
from eval.tasks import TASKS


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
