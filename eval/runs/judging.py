"""A language model's part in scoring a run: looked for beforehand, and done without where it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from eval.errors import UserError, one_line
from eval.runs.writer import RunFolder
from eval.tasks.base import EXACT_MATCH, NO_JUDGE
from eval.tasks.judge import JudgeError

if TYPE_CHECKING:
    from eval.tasks.loading import Loaded


def look_for_judge(loaded: Loaded) -> None:
    """Say beforehand that a judge does not answer: there are hours to start it, and the answers are kept."""
    if loaded.judge is not None:
        try:
            loaded.judge.check()
        except UserError as error:
            print(f"warning: {one_line(error)}; the answers are collected without it", file=sys.stderr, flush=True)


def judged(loaded: Loaded, folder: RunFolder, evaluate: Callable[[], dict]) -> tuple[dict, str | None]:
    """What lmms-eval makes of the answers, and why the judge scored none of them: None if it scored all.

    A judge that fails costs its own metrics only; nothing is put in the place of a judgement.
    """
    if loaded.judge is None:
        wanted = loaded.task.judge and loaded.settings.options["judge"] != EXACT_MATCH
        return evaluate(), NO_JUDGE if wanted else None
    loaded.judge.keep_in(folder.judged)
    try:
        loaded.judge.check_again()
        return evaluate(), None
    except JudgeError as error:
        with loaded.judge.silenced():
            return evaluate(), one_line(error)
