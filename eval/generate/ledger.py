"""Append-only record of the answers of one run, from which a killed run resumes.

Answers are JSON lines, appended batch by batch and synced to disk before the next batch starts. An incomplete last line
is removed when the ledger is opened again. Each of a run's processes writes its own file and reads all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from eval.jsonl import JsonLines, read_rows

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Answer:
    """One answered document of a task.

    Attributes:
        task, doc_id: the document, in lmms-eval's names.
        prompt: the question as lmms-eval put it.
        text: the model's answer, cut at the task's stop strings.
        input_tokens: tokens of the prompt, visual ones included, padding excluded.
        output_tokens: generated tokens, end-of-sequence included.
        visual: visual tokens of the prompt.
        entering, leaving: mean visual tokens per layer of the language model, before and after each layer's pruning.
        seconds: wall time of its batch (pictures, prompt and generation) divided by the batch's size. Pictures and
            prompts that were prepared once for several runs count in each.
        notes: about the pruning, of questions whose place in the picture is known; see notes.py.
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
    notes: dict = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.task, str(self.doc_id), self.prompt


@dataclass(frozen=True)
class Failure:
    """A document whose question could not be answered.

    Attributes:
        task, doc_id, prompt: as in :class:`Answer`.
        error: the error message, on one line.
    """

    task: str
    doc_id: int | str
    prompt: str
    error: str

    @property
    def key(self) -> Key:
        return self.task, str(self.doc_id), self.prompt


class Ledger:
    """The answers of one run configuration on disk.

    Args:
        path: the file of process 0; its folder must exist.
        config_hash: answers written under another hash are ignored.
        process: which of several processes this is; others than 0 write to `<path>.<process>`.

    Raises:
        BlockingIOError: another process has this file open.
    """

    def __init__(self, path: Path, config_hash: str, process: int = 0) -> None:
        self.path = Path(path) if process == 0 else Path(f"{path}.{process}")
        self.config_hash = config_hash
        self._first = Path(path)
        self._file = JsonLines(self.path)
        self._records: dict[Key, Answer | Failure] = {}
        self.read()

    def read(self) -> None:
        """Read what all processes have written so far."""
        self._records = {}
        for path in ledger_files(self._first):
            for row in read_rows(path):
                try:
                    if row.pop("config") == self.config_hash:
                        self._add(Failure(**row) if "error" in row else Answer(**row))
                except (KeyError, TypeError):
                    continue  # not a row of ours; its document is asked again

    def _add(self, record: Answer | Failure) -> None:
        """Add a record. An answer overrides a failure: failed documents are asked again in the next attempt."""
        if isinstance(record, Answer) or not isinstance(self._records.get(record.key), Answer):
            self._records[record.key] = record

    def __len__(self) -> int:
        return sum(isinstance(r, Answer) for r in self._records.values())

    def get(self, task: str, doc_id: int | str, prompt: str) -> Answer | None:
        """Return the recorded answer to this prompt, or None."""
        found = self._records.get((task, str(doc_id), prompt))
        return found if isinstance(found, Answer) else None

    def failure(self, task: str, doc_id: int | str, prompt: str) -> Failure | None:
        """Return the recorded failure of this prompt, or None if there is none or an answer."""
        found = self._records.get((task, str(doc_id), prompt))
        return found if isinstance(found, Failure) else None

    def append(self, records: Sequence[Answer | Failure]) -> None:
        """Write a batch; return when it is on disk."""
        self._file.append({"config": self.config_hash, **asdict(record)} for record in records)
        for record in records:
            self._add(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def ledger_files(path: Path) -> list[Path]:
    """Return the existing ledger files of all processes of a run, given the path of process 0."""
    return [p for p in (path, *sorted(path.parent.glob(f"{path.name}.*"))) if p.is_file()]
