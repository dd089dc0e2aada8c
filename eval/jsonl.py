"""Append-only files of JSON lines, from which an interrupted command resumes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


class JsonLines:
    """A file of JSON lines that one process appends to; an incomplete last line is removed when it is opened.

    Raises:
        BlockingIOError: another process has the file open.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise BlockingIOError(f"another process is writing {path}") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)

    def append(self, rows: Iterable[Mapping]) -> None:
        """Write rows; return when they are on disk."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a file, without damaged lines and an incomplete last one."""
    content = path.read_bytes() if path.is_file() else b""
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
