"""Where the time of a pruned prefill goes: pruning's own work, named part by part.

`with part("scores"):` stands around the places where that is done and does nothing unless somebody collects. The parts:

- "prompt": reading where visual tokens, text and padding are;
- "raters": choosing the text tokens that rate, from the embeddings;
- "scores": attention rows and what is made of them, without the keys, which the layer then does not compute again;
- "selection": ranking the scores and counting what stays;
- "recycling": clustering dropped tokens and merging them;
- "gathering": moving the rows that stay, at the end also back into a sequence of full length;
- "masks": masks and rotary tables of the shortened sequence, and the state on the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

PARTS = ("prompt", "raters", "scores", "selection", "recycling", "gathering", "masks")


class Clock(Protocol):
    """What times parts; on a device a mark is an event that is read after `wait`."""

    def mark(self) -> Any: ...

    def elapsed_ms(self, start: Any, end: Any) -> float: ...

    def wait(self) -> None: ...


class _Marks:
    """Moments at which another part began, with the part that ended there (None: nothing of pruning's)."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.inside: list[str | None] = [None]
        self.moments: list[tuple[str | None, Any]] = []

    def add(self) -> None:
        self.moments.append((self.inside[-1], self.clock.mark()))


_marks: _Marks | None = None
_nothing = nullcontext()


def part(name: str | None) -> AbstractContextManager:
    """Count what the block takes as `name`; inside another part it counts for the inner one only.

    None is work that is not pruning's: the layer is spared it.
    """
    return _nothing if _marks is None else _inside(_marks, name)


@contextmanager
def _inside(marks: _Marks, name: str | None) -> Iterator[None]:
    marks.add()
    marks.inside.append(name)
    try:
        yield
    finally:
        marks.add()
        marks.inside.pop()


@contextmanager
def collect(clock: Clock) -> Iterator[dict[str, float]]:
    """Time the parts of everything that prunes inside the block, in this process.

    Yields:
        seconds per part, filled in when the block is left; parts that did not occur are missing.

    Raises:
        RuntimeError: inside another `collect`.
    """
    global _marks
    if _marks is not None:
        raise RuntimeError("parts are being collected already; leave the other collect() first")
    _marks = marks = _Marks(clock)
    seconds: dict[str, float] = {}
    try:
        yield seconds
    finally:
        _marks = None
    clock.wait()
    for (_, start), (name, end) in zip(marks.moments, marks.moments[1:], strict=False):
        if name is not None:
            seconds[name] = seconds.get(name, 0.0) + clock.elapsed_ms(start, end) / 1e3
