"""One-line error reporting and exit statuses."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

#: Exit statuses: a run failed; the request is invalid; all runs are finished, but one excludes questions, or lacks a
#: metric that a language model should have judged.
RUN, USER, EXCLUDED, NOT_JUDGED = 1, 2, 3, 4
ON_ERROR = ("stop", "record")  # what to do at a question that cannot be answered


class UserError(Exception):
    """An invalid request. The message is one line: what is wrong, then how to correct it."""


def report(error: Exception, what: str = "", shown: bool = True) -> int:
    """Print an error on one line of stderr (with SPARSEVLM_TRACEBACK=1 after its traceback).

    Args:
        what: prefix of the message: the step that failed.
        shown: False = print nothing, only return the exit status.

    Returns:
        The exit status of this error.
    """
    expected = isinstance(error, UserError)
    if not shown:
        return USER if expected else RUN
    if os.environ.get("SPARSEVLM_TRACEBACK") == "1":
        traceback.print_exception(error)
    text = one_line(error) if expected else f"{type(error).__name__}: {one_line(error)}"
    hint = "" if expected else " (SPARSEVLM_TRACEBACK=1 shows where)"
    print(f"error: {what}{text}{hint}", file=sys.stderr, flush=True)
    return USER if expected else RUN


def worst(statuses: Iterable[int]) -> int:
    """Return the exit status of several jobs: the first of failed run, invalid request, excluded questions, metric not
    judged, and success that occurs."""
    found = set(statuses)
    return next((s for s in (RUN, USER, EXCLUDED, NOT_JUDGED) if s in found), 0)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return the message for an unknown name: the nearest known one, and all known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {str(name)!r}.{hint} Known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
