"""What a benchmark has measured so far: a file of one JSON object per line, to which is only appended.

A line is a `machine` (the first), the `facts` of a setting, a `sample` (one setting in one round) or a `failed`
setting. An interrupted benchmark goes on from there; a line that was cut off is taken away.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparsevlm.cost.harness import Facts, Sample

SCHEMA = 1
NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Group:
    """Settings that are timed in the same rounds.

    Attributes:
        shape: of the model, a name of `networks.network`.
        prompt: "35+576+25": text, visual tokens, text.
        batch_size: equal prompts.
        dtype, attention, device: as on the command line.
        threads: of torch on the CPU.
        decode_tokens: steps per round.
    """

    shape: str
    prompt: str
    batch_size: int
    dtype: str
    attention: str
    device: str
    threads: int
    decode_tokens: int

    def __str__(self) -> str:
        return f"{self.shape} {self.prompt} batch {self.batch_size} {self.dtype} {self.attention} {self.device} " \
            f"{self.threads} threads {self.decode_tokens} steps"  # fmt: skip


@dataclass
class Record:
    """One setting of a group.

    Attributes:
        group, method, budget, options: what.
        facts: None until it ran.
        samples: by round.
        failed: why it cannot run, None if it can.
    """

    group: Group
    method: str
    budget: int | str | None
    options: dict
    facts: Facts | None = None
    samples: dict[int, Sample] = field(default_factory=dict)
    failed: str | None = None


class Ledger:
    """The lines of a folder's ledger, and the way to add to them.

    Attributes:
        machine: where and with what it was measured.
        records: by group and setting, in the order in which they came.

    Raises:
        ValueError: the file is no ledger of this schema.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.machine: dict = {}
        self.records: dict[tuple[str, str], Record] = {}
        self._file = None
        self._whole = 0
        if self.path.is_file():
            self._read()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def open(self, machine: dict) -> None:
        """Start to append; leaving the `with` block ends it.

        Raises:
            ValueError: it was measured elsewhere or with other code: such times must not mix.
            OSError: the folder cannot be written, or another process is writing there.
        """
        different = [k for k in machine if self.machine and self.machine.get(k) != machine[k]]
        if different:
            k = different[0]
            raise ValueError(
                f"{self.path} was measured with {k} {self.machine.get(k)!r}, now it is {machine[k]!r}: times of both "
                "do not mix. Give another --out, or move that folder away"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"another process is writing to {self.path}: wait for it, or give another --out") from error
        os.truncate(self.path, self._whole)
        if not self.machine:
            self.machine = machine
            self._append({"machine": machine, "schema": SCHEMA})

    def record(self, group: Group, method: str, budget: int | str | None, options: dict) -> Record:
        """The record of a setting, made if there is none."""
        key = str(group), json.dumps([method, budget, options], sort_keys=True, default=list)
        return self.records.setdefault(key, Record(group, method, budget, options))

    def note_facts(self, record: Record, facts: Facts) -> None:
        record.facts = facts
        self._append({**self._name(record), "facts": asdict(facts)})

    def note_failure(self, record: Record, reason: str) -> None:
        record.failed = reason
        self._append({**self._name(record), "failed": reason})

    def note_samples(self, number: int, samples: list[tuple[Record, Sample]]) -> None:
        """The samples of one round."""
        for record, sample in samples:
            record.samples[number] = sample
        self._append(*({**self._name(r), "round": number, "sample": asdict(s)} for r, s in samples))

    def _name(self, record: Record) -> dict:
        return {"group": asdict(record.group), "setting": [record.method, record.budget, record.options]}

    def _append(self, *objects: dict) -> None:
        self._file.write("".join(json.dumps(o, default=list) + "\n" for o in objects))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._whole = content.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in content[: self._whole].splitlines()]
            if lines and lines[0]["schema"] != SCHEMA:
                raise ValueError(f"its schema is {lines[0]['schema']!r}, this version reads {SCHEMA}")
            for line in lines:
                self._take(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}): move it away") from error

    def _take(self, line: dict) -> None:
        if "machine" in line:
            self.machine = line["machine"]
            return
        record = self.record(Group(**line["group"]), *line["setting"])
        if "failed" in line:
            record.failed = line["failed"]
        elif "facts" in line:
            cuts = line["facts"].pop("cuts")
            record.facts = Facts(**line["facts"], cuts=cuts and {int(k): v for k, v in cuts.items()})
        else:
            record.samples[line["round"]] = Sample(**line["sample"])
