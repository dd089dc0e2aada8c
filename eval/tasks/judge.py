"""Answers scored by a language model behind an OpenAI-compatible endpoint, or by comparing strings without one.

What is asked, and how replies are read, is the benchmarks' own (judgements.py). lmms-eval's judge code is not
used: there, an endpoint that cannot be reached scores 0. Here a request that fails and a reply that cannot be read
leave the run without the judged metrics, which its results then say; answers and replies are kept, and the same command
goes on judging them. Scores move by several points with the judge's version, so the name it reports goes into the
results.

The key is read from OPENAI_API_KEY and never written anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from eval.errors import UserError, one_line
from eval.tasks.base import EXACT_MATCH
from eval.tasks.judgements import JUDGEMENTS

CHECK_SECONDS = 20  # an endpoint that says nothing for so long before the run will not carry it


class JudgeError(RuntimeError):
    """The judge cannot be reached any more, or its reply cannot be read."""


@dataclass
class Judge:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        model: as the endpoint calls it.
        url: up to and without `/chat/completions`.
        timeout: seconds for one reply.
        versions: what the endpoint said which model answered.
    """

    model: str
    url: str
    timeout: float = 60.0
    versions: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._replies: dict[str, dict] = {}
        self._file: Path | None = None
        self._written: set[str] = set()
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._silent = False

    def check(self) -> None:
        """See that the endpoint answers.

        Raises:
            UserError: it does not.
        """
        try:
            request = {"messages": [{"role": "user", "content": "Reply with the word yes."}], "max_tokens": 16}
            self._request(request, CHECK_SECONDS, retries=0)
        except Exception as error:
            self._broken = f"the judge {self.model} at {self.url} does not answer"
            raise UserError(
                f"the judge {self.model} at {self.url} does not answer ({type(error).__name__}: {one_line(error)}); "
                f"check task.judge_url, task.judge and OPENAI_API_KEY, or give task.judge={EXACT_MATCH}"
            ) from error
        self._broken = None

    def check_again(self) -> None:
        """See that an endpoint answers that did not when it was asked last.

        Raises:
            JudgeError: it still does not.
        """
        if self._broken:
            try:
                self.check()
            except UserError as error:
                raise JudgeError(one_line(error)) from error

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Within the block nothing is judged: `scorer` gives exact match alone."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def keep_in(self, file: Path) -> None:
        """Look replies up in a file of JSON lines, and write all that are used to it: a killed run asks nothing twice.

        Raises:
            UserError: a line that is no reply.
        """
        self._file, self._written = file, set()
        self.versions.clear()
        content = file.read_bytes() if file.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # torn by a crash
            os.truncate(file, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self._replies[row["request"]] = {"reply": row["reply"], "version": row["version"], **row}
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file}: line {number} is no reply of a judge. Delete it to ask again") from error
            self._written.add(row["request"])

    def put_in_order(self) -> None:
        """Sort the file, whose lines came as several questions at once were answered."""
        if self._file is not None and self._file.is_file():
            draft = self._file.with_suffix(".draft")
            draft.write_text("".join(sorted(self._file.read_text(encoding="utf-8").splitlines(True))), encoding="utf-8")
            os.replace(draft, self._file)

    def ask(self, requests: Sequence[dict], read: Callable[[str], dict], about: str, run: int = 0) -> dict:
        """Ask, and read the reply.

        Args:
            requests: arguments of a chat completion, the model left out: what is asked first, and what is asked while
                the reply cannot be read.
            read: reply -> scores; ValueError if it cannot be read.
            about: the question and its answer, for an error.
            run: number of the judge's run; each asks anew.

        Returns:
            `scores`, `reply` and `version`.

        Raises:
            JudgeError: the request failed after retries, or no reply could be read.
        """
        key = hashlib.sha256(json.dumps([self.url, self.model, requests[0], run]).encode()).hexdigest()
        row = self._replies.get(key)
        if row is None:
            row = {"request": key, **self._readable(requests, read, about)}
        self._keep(row)
        return {"scores": read(row["reply"]), "reply": row["reply"], "version": row["version"]}

    def _readable(self, requests: Sequence[dict], read: Callable[[str], dict], about: str) -> dict:
        reply = ""
        for request in requests:
            if self._broken:
                raise JudgeError(self._broken)
            try:
                reply, version = self._request(request, self.timeout, retries=3)
            except Exception as error:
                self._broken = (
                    f"the judge {self.model} at {self.url} stopped answering ({type(error).__name__}: "
                    f"{one_line(error)}); nothing was scored in its place, the same command asks again"
                )
                raise JudgeError(self._broken) from error
            try:
                read(reply)
            except ValueError:
                continue
            return {"reply": reply, "version": version}
        raise JudgeError(f"the judge {self.model} replied {reply!r:.200}, which is no score, about {about}")

    def _request(self, request: dict, timeout: float, retries: int) -> tuple[str, str]:
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local endpoints want none, but the client insists
        with OpenAI(base_url=self.url, api_key=key, timeout=timeout, max_retries=retries) as client:
            reply = client.chat.completions.create(model=self.model, **request)
        if not reply.choices or not reply.choices[0].message.content:
            raise ValueError("the reply is empty")
        return reply.choices[0].message.content, reply.model or self.model

    def _keep(self, row: dict) -> None:
        with self._lock:
            self._replies[row["request"]] = row
            self.versions.add(row["version"])
            if self._file is None or row["request"] in self._written:
                return
            self._written.add(row["request"])
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())


def judge_of(options: Mapping) -> Judge | None:
    """The judge that a task's options name; None for comparing strings. The same one for equal options."""
    if options["judge"] in (None, "", EXACT_MATCH):
        return None
    return _judge(str(options["judge"]), str(options["judge_url"]).rstrip("/"), float(options["judge_timeout"]))


@lru_cache(maxsize=8)
def _judge(model: str, url: str, timeout: float) -> Judge:
    return Judge(model, url, timeout)


def scorer(kind: str, judge: Judge | None, runs: int = 1) -> Callable[[dict, list[str]], dict]:
    """The `process_results` of a judged task: exact match and, where there is a judge, its scores.

    Args:
        kind: of `eval.tasks.judgements.JUDGEMENTS`.
        runs: how often the judge is asked about each answer. Of several, the scores are means, and `<score>_run<i>`
            is what each run gave.
    """
    judgement = JUDGEMENTS[kind]

    def process_results(doc: dict, results: list[str]) -> dict:
        scores = {EXACT_MATCH: exact_match(doc.get("answer", doc.get("gpt_answer")), results[0])}
        if judge is None or judge._silent:
            return scores
        requests = judgement.requests(doc, results[0])
        about = f"{doc['question']!r}, answered with {results[0]!r:.200}"
        replies = [judge.ask(requests, judgement.read, about, run) for run in range(runs)]
        for name in replies[0]["scores"]:
            each = [reply["scores"][name] for reply in replies]
            scores[name] = fmean(each)
            scores |= {f"{name}_run{i}": score for i, score in enumerate(each, 1) if runs > 1}
        return {**scores, "judge_replies": [reply["reply"] for reply in replies]}

    return process_results


def normalise(text: str) -> str:
    """Lower case, no articles, no punctuation, single spaces."""
    words = re.sub(r"[^\w\s.-]|(?<!\d)[.-](?!\d)", " ", str(text).lower()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def exact_match(answer: str, prediction: str) -> float:
    """1 if the prediction is the answer after `normalise`; in MM-Vet's notation, if it is one of the answers divided by
    <OR>, or has in it, as whole words, all of those divided by <AND>."""
    said = normalise(prediction)
    for alternative in str(answer).split("<OR>"):
        parts = [normalise(p) for p in alternative.split("<AND>")]
        if len(parts) == 1 and said == parts[0]:
            return 1.0
        if len(parts) > 1 and all(f" {p} " in f" {said} " for p in parts):
            return 1.0
    return 0.0
