"""Answers scored by a language model behind an OpenAI-compatible endpoint, or by comparing strings without one.

The prompts are those of the benchmarks (Video-ChatGPT's for questions about videos, MM-Vet's own), taken from
lmms-eval. Its own judge code is not used: there, an endpoint that cannot be reached scores 0. Here it is looked for
before anything is generated, a request that fails ends the run (its answers are kept), and so does a reply that cannot
be read. Scores move by several points with the judge's version, so the name it reports goes into the results.

The key is read from OPENAI_API_KEY and never written anywhere.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from eval.errors import UserError, one_line
from eval.tasks.base import EXACT_MATCH

CHECK_SECONDS = 20  # an endpoint that says nothing for so long before the run will not carry it
_TEMPERATURES = (0.0, 0.5, 1.0)  # a reply that cannot be read is asked for again
_MAX_TOKENS = 128


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

    def check(self) -> None:
        """See that the endpoint answers.

        Raises:
            UserError: it does not.
        """
        try:
            self._request([{"role": "user", "content": "Reply with the word yes."}], 0.0, CHECK_SECONDS, retries=0)
        except Exception as error:
            raise UserError(
                f"the judge {self.model} at {self.url} does not answer ({type(error).__name__}: {one_line(error)}); "
                f"check task.judge_url, task.judge and OPENAI_API_KEY, or give task.judge={EXACT_MATCH}"
            ) from error
        self._broken = None

    def keep_in(self, file: Path) -> None:
        """Look replies up in this file of JSON lines, and write there all that are used from now on: a killed run asks
        nothing twice, and each run has its own."""
        self._file, self._written = file, set()
        self.versions.clear()
        content = file.read_bytes() if file.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # torn by a crash
            os.truncate(file, whole)
        for line in content[:whole].splitlines():
            row = json.loads(line)
            self._replies[row["request"]] = row
            self._written.add(row["request"])

    def put_in_order(self) -> None:
        """Sort the file, whose lines came as several questions at once were answered."""
        if self._file is not None and self._file.is_file():
            draft = self._file.with_suffix(".draft")
            draft.write_text("".join(sorted(self._file.read_text(encoding="utf-8").splitlines(True))), encoding="utf-8")
            os.replace(draft, self._file)

    def ask(self, messages: list[dict], read: Callable[[str], dict], about: str) -> dict:
        """Ask, and read the reply.

        Args:
            read: reply -> scores; ValueError if it cannot be read.
            about: the question and its answer, for an error.

        Returns:
            The scores, `judge_reply` and `judge_version`.

        Raises:
            JudgeError: the request failed after retries, or no reply could be read.
        """
        request = hashlib.sha256(json.dumps([self.url, self.model, messages]).encode()).hexdigest()
        row = self._replies.get(request)
        if row is None:
            row = {"request": request, **self._readable(messages, read, about)}
        self._keep(row)
        return {**read(row["reply"]), "judge_reply": row["reply"], "judge_version": row["version"]}

    def _readable(self, messages: list[dict], read: Callable[[str], dict], about: str) -> dict:
        reply = ""
        for temperature in _TEMPERATURES:
            if self._broken:
                raise JudgeError(self._broken)
            try:
                reply, version = self._request(messages, temperature, self.timeout, retries=3)
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

    def _request(self, messages, temperature: float, timeout: float, retries: int) -> tuple[str, str]:
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local endpoints want none, but the client insists
        with OpenAI(base_url=self.url, api_key=key, timeout=timeout, max_retries=retries) as client:
            reply = client.chat.completions.create(
                model=self.model, messages=messages, temperature=temperature, max_tokens=_MAX_TOKENS
            )
        if not reply.choices or not reply.choices[0].message.content:
            raise ValueError("the reply is empty")
        return reply.choices[0].message.content.strip(), reply.model or self.model

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
    if options["judge"] == EXACT_MATCH:
        return None
    return _judge(str(options["judge"]), str(options["judge_url"]).rstrip("/"), float(options["judge_timeout"]))


@lru_cache(maxsize=8)
def _judge(model: str, url: str, timeout: float) -> Judge:
    return Judge(model, url, timeout)


def scorer(kind: str, judge: Judge | None) -> Callable[[dict, list[str]], dict]:
    """The `process_results` of a judged task: exact match, and the judge's scores where there is one."""
    ask = {"video_qa": video_qa, "mmvet": mmvet}[kind]

    def process_results(doc: dict, results: list[str]) -> dict:
        scores = {EXACT_MATCH: exact_match(doc["answer"], results[0])}
        return scores if judge is None else {**scores, **ask(judge, doc["question"], doc["answer"], results[0])}

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


def video_qa(judge: Judge, question: str, answer: str, prediction: str) -> dict:
    """Video-ChatGPT's judgement: `gpt_accuracy` 1.0 or 0.0, `gpt_score` 0 to 5."""
    system = (
        "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for "
        "question-answer pairs. Your task is to compare the predicted answer with the correct answer and determine if "
        "they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: "
        "- Focus on the meaningful match between the predicted answer and the correct answer.\n"
        "- Consider synonyms or paraphrases as valid matches.\n"
        "- Evaluate the correctness of the prediction compared to the answer."
    )
    user = (
        "Please evaluate the following video-based question-answer pair:\n\n"
        f"Question: {question}\nCorrect Answer: {answer}\nPredicted Answer: {prediction}\n\n"
        "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, with "
        "5 indicating the highest meaningful match. Please generate the response in the form of a Python dictionary "
        "string with keys 'pred' and 'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' "
        "is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python "
        "dictionary string. For example, your response should look like this: {'pred': 'yes', 'score': 4.8}."
    )
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return judge.ask(messages, read_video_qa, f"{question!r}, answered with {prediction!r:.200}")


def read_video_qa(reply: str) -> dict:
    """The dictionary in a reply; the score is cut to an integer, as Video-ChatGPT's and Video-LLaVA's tools do.

    Raises:
        ValueError: there is none, or it does not say yes or no and a score from 0 to 5.
    """
    found = re.search(r"\{[^{}]*\}", reply)
    try:
        review = ast.literal_eval(found[0]) if found else {}
        verdict, score = str(review["pred"]).strip().lower(), int(float(review["score"]))
    except (KeyError, TypeError, SyntaxError, ValueError) as error:
        raise ValueError(f"no verdict in {reply!r}") from error
    if verdict not in ("yes", "no") or not 0 <= score <= 5:
        raise ValueError(f"no verdict in {reply!r}")
    return {"gpt_accuracy": float(verdict == "yes"), "gpt_score": float(score)}


def mmvet(judge: Judge, question: str, answer: str, prediction: str) -> dict:
    """MM-Vet's judgement: `gpt_eval_score` from 0 to 1."""
    marked = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{_mmvet_examples()}\n{question} | {marked} | {prediction} |"
    return judge.ask(
        [{"role": "user", "content": prompt}], read_mmvet, f"{question!r}, answered with {prediction!r:.200}"
    )


def read_mmvet(reply: str) -> dict:
    """The number a reply starts with.

    Raises:
        ValueError: none between 0 and 1.
    """
    score = float(reply.strip().split()[0].rstrip(".|,")) if reply.strip() else -1.0
    if not 0 <= score <= 1:
        raise ValueError(f"no score in {reply!r}")
    return {"gpt_eval_score": score}


@lru_cache(maxsize=1)
def _mmvet_examples() -> str:
    from eval.tasks.loading import undisturbed

    with undisturbed():
        from lmms_eval.tasks.mmvet.utils import MM_VET_PROMPT

    return MM_VET_PROMPT
