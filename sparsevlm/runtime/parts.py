"""What a pruned prefill spends on pruning: the method's own work, named part by part.

`with part("scores"):` stands around every place where own work is done, wherever that is (vision tower, projector,
language model), and does nothing unless somebody watches. Times (`collect`) and multiply-adds (`cost/counters.py`) are
booked by the same marks: what is inside a part is the method's, everything else the model's. The parts:

- "guide": a second model that runs first (`runtime/guide.py`), with its tower and projector: a cost of its own, which
  counts as neither the method's own work nor the model's;
- "prompt": reading where visual tokens, text and padding are, and what the question is;
- "pictures": what a method that acts before the language model makes of the pictures' tokens: scores, choice, merging;
- "raters": choosing the text tokens that rate, from the embeddings;
- "scores": attention rows and what is made of them, with the queries and keys that the layer computes once more;
- "selection": ranking the scores and counting what stays;
- "recycling": clustering dropped tokens and merging them;
- "gathering": moving the rows that stay, at the end also back into a sequence of full length;
- "masks": masks and rotary tables of the shortened sequence, and the state on the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

GUIDE = "guide"
PARTS = (GUIDE, "prompt", "pictures", "raters", "scores", "selection", "recycling", "gathering", "masks")
Watcher = Callable[[str | None], AbstractContextManager]


class Clock(Protocol):
    """What times parts; on a device a mark is an event that is read after `wait`."""

    def mark(self) -> Any: ...

    def elapsed_ms(self, start: Any, end: Any) -> float: ...

    def wait(self) -> None: ...


_watcher: Watcher | None = None
_nothing = nullcontext()


def part(name: str | None) -> AbstractContextManager:
    """Book what the block does as `name`; inside another part it counts for the inner one only.

    None is work that is not pruning's: the layer is spared it, or would have done it without the method, too.
    """
    return _nothing if _watcher is None else _watcher(name)


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Enter `watcher(name)` around everything that is done as part `name` inside the block, in this process.

    Raises:
        RuntimeError: inside another `watch` or `collect`.
    """
    global _watcher
    if _watcher is not None:
        raise RuntimeError("parts are being collected already; leave the other collect() first")
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


class Marks:
    """Moments at which another part began, with the part that ended there (None: nothing of pruning's).

    `watch(marks.watch)` makes them. `only`: names of the parts to mark, None = all.
    """

    def __init__(self, clock: Clock, only: Collection[str] | None = None):
        self.clock, self.only = clock, only
        self.inside: list[str | None] = [None]
        self.moments: list[tuple[str | None, Any]] = []

    def add(self) -> None:
        self.moments.append((self.inside[-1], self.clock.mark()))

    def watch(self, name: str | None) -> AbstractContextManager:
        other = name is not None and self.only is not None and name not in self.only
        return _nothing if other or name == self.inside[-1] else self._within(name)

    @contextmanager
    def _within(self, name: str | None) -> Iterator[None]:
        self.add()
        self.inside.append(name)
        try:
            yield
        finally:
            self.add()
            self.inside.pop()

    def spans(self) -> list[tuple[str, Any, Any]]:
        """Name, begin and end of each stretch of own work, in order."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [(name, start, end) for (_, start), (name, end) in pairs if name is not None]


@contextmanager
def collect(clock: Clock) -> Iterator[dict[str, float]]:
    """Time the parts of everything that prunes inside the block, in this process.

    Yields:
        seconds per part, filled in when the block is left; parts that did not occur are missing.

    Raises:
        RuntimeError: inside another `watch` or `collect`.
    """
    marks = Marks(clock)
    seconds: dict[str, float] = {}
    with watch(marks.watch):
        yield seconds
    clock.wait()
    for name, start, end in marks.spans():
        seconds[name] = seconds.get(name, 0.0) + clock.elapsed_ms(start, end) / 1e3
