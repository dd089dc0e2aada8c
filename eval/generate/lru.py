"""A mapping of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class LeastRecentlyUsed:
    """A mapping that holds at most `max_bytes`; what was not used for longest goes first.

    Attributes:
        bytes: what it holds now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable):
        """Return what was put under `key`, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value, size: int) -> None:
        """Keep `value` of `size` bytes, unless it is larger than everything together may be."""
        if size > self.max_bytes or key in self._kept:
            return
        self._kept[key] = value, size
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._kept.popitem(last=False)[1][1]
