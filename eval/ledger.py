"""Append-only record of the answers of one run: what a killed run had answered is not asked again.

One JSON line per answer, appended batch by batch and synced to disk before the next batch starts. A line that a crash
tore is cut off when the ledger is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Answer:
    """One answered document.

    Attributes:
        task, doc_id: the document, in lmms-eval's names.
        prompt: the question as lmms-eval put it.
        text: what the model said, cut at the task's stop strings.
        input_tokens: tokens of the prompt, visual ones included, padding excluded.
        output_tokens: generated tokens, end-of-sequence included.
        visual: visual tokens of the prompt.
        entering, leaving: mean visual tokens per layer of the language model, before and after each layer's pruning.
        seconds: wall time of its batch (pictures, prompt and generation) divided by the batch's size.
    """

    task: str
    doc_id: int | str
    prompt: str
    text: str
    input_tokens: int
    output_tokens: int
    visual: int
    entering: float
    leaving: float
    seconds: float

    @property
    def key(self) -> Key:
        return self.task, str(self.doc_id), self.prompt


class Ledger:
    """The answers of one run configuration on disk.

    Args:
        path: the file; its folder must exist.
        config_hash: answers written under another hash are ignored.

    Raises:
        BlockingIOError: another process has the ledger open.
    """

    def __init__(self, path: Path, config_hash: str) -> None:
        self.path, self.config_hash = Path(path), config_hash
        self._file = open(self.path, "ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise BlockingIOError(f"another process is writing {self.path}") from None
        self._answers = self._load()

    def _load(self) -> dict[Key, Answer]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        answers = {}
        for line in content[:whole].splitlines():
            try:
                row = json.loads(line)
                if row.pop("config") == self.config_hash:
                    answer = Answer(**row)
                    answers[answer.key] = answer
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # not a line of ours: a disk error or another version; its document is asked again
        return answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, task: str, doc_id: int | str, prompt: str) -> Answer | None:
        """The recorded answer to this prompt, or None."""
        return self._answers.get((task, str(doc_id), prompt))

    def append(self, answers: Sequence[Answer]) -> None:
        """Write a batch of answers; returns when they are on disk."""
        lines = [json.dumps({"config": self.config_hash, **asdict(a)}, ensure_ascii=False) + "\n" for a in answers]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._answers.update((a.key, a) for a in answers)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self.close()
