"""How things that go wrong are told: one line, with what to do about it."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

#: Exit statuses: a run failed; something asked for cannot be; all runs are there, but one leaves questions out, or
#: lacks a metric that a language model should have judged.
RUN, USER, EXCLUDED, NOT_JUDGED = 1, 2, 3, 4
ON_ERROR = ("stop", "record")  # what to do at a question that cannot be answered


class UserError(Exception):
    """Something that was asked for cannot be; the message is one line and says how to put it right."""


def report(error: Exception, what: str = "", shown: bool = True) -> int:
    """Tell an error on one line of stderr (with SPARSEVLM_TRACEBACK=1 also where it came from).

    Args:
        what: what was being done, put in front.
        shown: False = only find the exit status.

    Returns:
        The exit status that goes with it.
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
    """The exit status of several jobs: a failed run counts more than a wrong request, that more than excluded
    questions, those more than a metric that was not judged, and that more than success."""
    found = set(statuses)
    return next((s for s in (RUN, USER, EXCLUDED, NOT_JUDGED) if s in found), 0)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that does not exist, with the nearest one that does and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {str(name)!r}.{hint} Known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
