"""Answers that another run has: runs that differ in their judge alone are never asked twice.

A run without a judge is nothing but answers with a plain comparison. One with a judge takes its folder over; the other
way round there is nothing left to do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from eval.errors import UserError
from eval.generate.ledger import ledger_files
from eval.runs.settings import RunSettings
from eval.runs.writer import LEDGER, STARTED, RunFolder
from eval.tasks import TASKS


def open_folder(folder: RunFolder, run: RunSettings) -> None:
    """Make the folder of an unfinished run, with the answers that there are already.

    Raises:
        UserError: see `RunFolder.open`.
    """
    if folder.finished and folder.not_scored():  # to be judged now
        _reopen(folder, folder)
    elif TASKS[run.task.name].judge and not folder.ledger.is_file():
        _adopt(folder, run)
    folder.open()


def judged_elsewhere(run: RunSettings) -> RunFolder | None:
    """The finished run that has all that this one would have, and a language model's judgement besides."""
    if run.task.judged or not TASKS[run.task.name].judge:
        return None
    own = RunFolder(run.results_dir, run.run_id())
    return next((f for f in _same_answers(run) if f.path != own.path and not f.not_scored()), None)


def _adopt(folder: RunFolder, run: RunSettings) -> None:
    for other in _same_answers(run):
        if other.path == folder.path:
            continue
        if other.metrics()["benchmark"]["judge"].get("url") is None:
            _reopen(other, folder)
            return
        _copy_answers(other.path, folder)
        return
    unjudged = RunFolder(run.results_dir, run.run_id(judged=False))
    if unjudged.path != folder.path and ledger_files(unjudged.ledger):
        _copy_answers(unjudged.partial, folder)


def _copy_answers(other: Path, folder: RunFolder) -> None:
    """Copy the answers of another run, and what is known of the code that gave them."""
    folder.partial.mkdir(parents=True, exist_ok=True)
    for path in (*ledger_files(other / LEDGER), other / STARTED):
        if path.is_file():
            shutil.copy(path, folder.partial)


def _reopen(finished: RunFolder, unfinished: RunFolder) -> None:
    try:
        os.rename(finished.path, unfinished.partial)
    except OSError as error:
        raise UserError(f"{unfinished.partial} is in the way ({error.strerror}); move it away") from error


def _same_answers(run: RunSettings) -> Iterator[RunFolder]:
    """Finished runs with the same answers, whose ledger is there."""
    prefix = run.run_id().rpartition("__")[0]
    for path in sorted((run.results_dir / "runs").glob(f"{prefix}__*")):
        other = RunFolder(run.results_dir, path.name)
        if not other.finished or not (path / LEDGER).is_file():
            continue
        try:
            if other.metrics().get("answers_hash") == run.answers_hash():
                yield other
        except UserError:  # no run of ours
            continue
