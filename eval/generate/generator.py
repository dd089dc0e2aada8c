"""Questions through `generate()`: batches, several methods on the same batch, and what to do when something fails.

A sweep asks every question under many methods. Its runs go through the questions together: a batch's pictures and
prompts are prepared once, its visual features are computed once (see features.py), and then every run generates and
writes its own ledger.

Which questions share a batch is fixed by the questions and the batch size alone. A run that resumes after a crash, or
on several processes, therefore computes the very batches that an undisturbed one would.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from lmms_eval.api.instance import Instance
from transformers import GenerationConfig

from eval.errors import one_line
from eval.generate.features import KINDS, FeatureStore, as_argument, encoder_outputs, shares_features
from eval.generate.ledger import Answer, Failure, Ledger
from eval.generate.notes import notes_of, targets_of
from eval.tasks.controls import Oracle
from eval.tasks.visuals import visuals
from sparsevlm.methods.base import Method
from sparsevlm.models import Processor

_KNOWN_BY_GENERATE = set(GenerationConfig().to_dict())
clock = time.perf_counter
MAX_NEW_TOKENS = 128  # for tasks that do not say
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class GenerationError(RuntimeError):
    """Preprocessing or generation failed; names the task and the document."""


@dataclass
class RunState:
    """The state of one run in a pass over the questions.

    Attributes:
        method: installed while this run generates.
        ledger: where its answers are kept and looked up; None = nowhere.
        answers, failures: by (task, doc_id).
        largest: prompts per `generate()`; halved when memory runs out, and then remembered.
        error: what stopped the run.
    """

    method: Method
    ledger: Ledger | None
    largest: int
    answers: dict[tuple[str, int | str], Answer] = field(default_factory=dict)
    failures: dict[tuple[str, int | str], Failure] = field(default_factory=dict)
    error: GenerationError | None = None
    asked: int = 0  # questions that were asked, not looked up, and the seconds that they took; what is prepared once
    spent: float = 0.0  # for several runs counts in the first of them
    shares: bool | None = None  # whether its features are those of the other runs; None = not known yet

    def look_up(self, requests: Sequence[Instance]) -> int:
        """Take the answers that the ledger has; returns how many."""
        before = len(self.answers)
        for request in requests if self.ledger is not None else ():
            context, _, _, doc_id, task, _ = request.args
            if (answer := self.ledger.get(task, doc_id, context)) is not None:
                self.answers[task, doc_id] = answer
        return len(self.answers) - before

    def keep(self, records: Sequence[Answer | Failure]) -> None:
        if self.ledger is not None:
            self.ledger.append(records)
        for record in records:
            into = self.answers if isinstance(record, Answer) else self.failures
            into[record.task, record.doc_id] = record


@dataclass
class Prepared:
    """A batch as `generate()` takes it.

    Attributes:
        inputs: ids, mask and pixels, on the CPU.
        features: of all pictures, by kind; None = not computed.
        seconds: what preparing it took, and of that the features.
    """

    inputs: Mapping[str, torch.Tensor]
    seconds: float
    features: dict | None = None
    features_seconds: float = 0.0


def generation_arguments(gen_kwargs: dict, max_new_tokens: int) -> tuple[dict, list[str]]:
    """Turn a task's `generation_kwargs` into arguments of `generate()`, without changing them.

    lmms-eval hashes the dict after the answers came back, so it must stay as it is; and it holds keys that
    `generate()` does not know (`until`, `image_aspect_ratio`). Greedy unless the task asks for sampling and gives a
    temperature above 0.

    Args:
        max_new_tokens: for tasks that do not say.

    Returns:
        (arguments, strings at which an answer ends)
    """
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else [u for u in until if u]
    kwargs = {k: v for k, v in gen_kwargs.items() if k in _KNOWN_BY_GENERATE and v is not None}
    kwargs.setdefault("max_new_tokens", max_new_tokens)
    kwargs["do_sample"] = bool(kwargs.get("do_sample")) and float(kwargs.get("temperature", 1.0)) > 0
    if not kwargs["do_sample"]:
        kwargs.update(dict.fromkeys(_SAMPLING))  # also those of the checkpoint's generation_config.json
    return kwargs, until


def clean(text: str, until: Sequence[str]) -> str:
    """Cut an answer at the first stop string, and strip the white space around it; nothing else is changed."""
    for stop in until:
        text = text.split(stop)[0]
    return text.strip()


def plan_batches(requests: Sequence[Instance], size: int) -> list[list[Instance]]:
    """Batches of requests with the same generation arguments and similar length, long ones first.

    Long ones come first so that memory, if it runs out, does so at once. A document that was asked for twice (lmms-eval
    pads the shares of processes with copies) is in one batch only.
    """
    groups: dict[str, dict[tuple, Instance]] = {}
    for request in requests:
        context, gen_kwargs, _, doc_id, task, _ = request.args
        group = groups.setdefault(json.dumps(gen_kwargs, sort_keys=True, default=str), {})
        group.setdefault((task, doc_id), request)
    out = []
    for group in groups.values():
        ordered = sorted(group.values(), key=lambda r: len(r.args[0]), reverse=True)
        out += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return out


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    known = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(k in text for k in known)


class Generator:
    """Generates the answers to questions.

    Args:
        features: keeps visual features; its model is asked.
        documents: task -> split -> documents, in which lmms-eval's requests look.
        max_new_tokens: for tasks that do not say.
        on_error: "stop" ends a run at a document that cannot be answered; "record" keeps it as a failure and continues.
    """

    def __init__(
        self,
        processor: Processor,
        features: FeatureStore,
        documents: Mapping,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_error: str = "stop",
    ) -> None:
        self.model, self.processor, self.features, self.documents = features.model, processor, features, documents
        self.max_new_tokens, self.on_error = max_new_tokens, on_error
        self._preparing = Lock()  # pictures are remembered; a batch may be prepared again while the next one is

    def ask(
        self, batches: Sequence[Sequence[Instance]], states: Sequence[RunState], advance: Callable[[int], None]
    ) -> None:
        """Answer all batches (of `plan_batches`) in all runs. A run that fails stops, the others go on.

        Args:
            advance: called with the number of answers that came.
        """
        todo = [batch for batch in batches if any(_lacks(state, batch) for state in states)]
        with ThreadPoolExecutor(1, "prepare") as thread:
            coming = [thread.submit(self._prepared, todo[0])] if todo else []
            for number, batch in enumerate(todo):
                ready = coming.pop()
                if all(state.error for state in states):
                    break
                if number + 1 < len(todo):  # while the model works on this batch
                    coming.append(thread.submit(self._prepared, todo[number + 1]))
                self._ask(batch, ready.result(), states, advance)

    def _ask(
        self, batch: list[Instance], prepared: dict[tuple, Prepared], states: Sequence[RunState], advance: Callable
    ) -> None:
        for state in states:
            if state.error is None and _lacks(state, batch):
                known = len(_documents_of(batch) & state.answers.keys())
                start = clock()
                try:
                    for records in self._answers(batch, state, prepared):
                        state.keep(records)
                        state.asked, state.spent = state.asked + len(records), state.spent + clock() - start
                        start = clock()
                        advance(len(records) - known)
                        known = 0
                except GenerationError as error:
                    state.error = error

    def _answers(self, batch: list[Instance], state: RunState, prepared: dict) -> Iterator[list[Answer | Failure]]:
        """Answers to a batch in parts that memory allows; documents that fail are found one by one."""
        for start in range(0, len(batch), state.largest) if len(batch) > state.largest else ():
            yield from self._answers(batch[start : start + state.largest], state, prepared)
        if len(batch) > state.largest:
            return
        smaller = None
        try:
            answers = self._generate(batch, state, prepared)
        except Exception as error:  # left before anything else happens: its traceback holds the batch's tensors
            prepared.pop(_documents(batch), None)
            if out_of_memory(error) and len(batch) > 1:
                smaller = f"{type(error).__name__}: {one_line(error)}"
            elif len(batch) > 1 and not isinstance(error, torch.AcceleratorError):
                smaller = ""
            else:
                failure = self._failure(batch, error)
                error.__traceback__ = None if failure is not None else error.__traceback__
                answers = [failure]
        if smaller is None:
            yield answers
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(batch) // 2 if smaller else 1
        if smaller:
            state.largest = half
            print(f"{state.method.name}: {smaller}; going on with batches of {half}", file=sys.stderr, flush=True)
        for start in range(0, len(batch), half):
            yield from self._answers(batch[start : start + half], state, prepared)

    def _failure(self, batch: list[Instance], error: Exception) -> Failure:
        """What to record of a document that cannot be answered.

        Raises:
            GenerationError: nothing shall be recorded, or it is not the document's fault.
        """
        what = f"{type(error).__name__}: {one_line(error)}"
        context, _, _, doc_id, task, _ = batch[0].args
        if self.on_error != "record" or isinstance(error, torch.AcceleratorError):
            documents = ", ".join(str(r.args[3]) for r in batch)
            several = "documents" if len(batch) > 1 else "document"
            raise GenerationError(f"task {task}, {several} {documents}: {what}") from error
        return Failure(task, doc_id, context, what)

    def _prepared(self, batch: list[Instance]) -> dict[tuple, Prepared]:
        """Prepare a batch ahead of time; empty where that fails: it is tried again, and reported, in its turn."""
        try:
            return {_documents(batch): self._prepare(batch)}
        except Exception:
            return {}

    def _prepare(self, batch: list[Instance]) -> Prepared:
        with self._preparing:
            return self._prepare_now(batch)

    def _prepare_now(self, batch: list[Instance]) -> Prepared:
        start = time.perf_counter()
        questions, media = [], []
        for request in batch:
            questions.append(request.args[0])
            media.append(visuals(request, self.documents))
        images, videos = zip(*media, strict=True)
        inputs = self.processor(questions, images=list(images), videos=list(videos) if any(videos) else None)
        return Prepared(inputs, time.perf_counter() - start)

    def _features(self, prepared: Prepared) -> dict:
        if prepared.features is None:
            start = time.perf_counter()
            prepared.features = encoder_outputs(self.features, prepared.inputs)
            prepared.features_seconds = time.perf_counter() - start
        return prepared.features

    @torch.inference_mode()
    def _generate(self, batch: list[Instance], state: RunState, known: dict[tuple, Prepared]) -> list[Answer]:
        if state.shares is None:
            state.shares = shares_features(self.model, state.method)
        kwargs, until = generation_arguments(batch[0].args[1], self.max_new_tokens)
        which = _documents(batch)
        if which not in known:
            known[which] = self._prepare(batch)
        prepared = known[which]
        seconds, inputs = prepared.seconds, prepared.inputs
        if state.shares:
            features = self._features(prepared)
            seconds += prepared.features_seconds
            inputs = {k: v for k, v in inputs.items() if k not in KINDS}
        start = time.perf_counter()
        inputs = {k: v.to(self.model.device) for k, v in inputs.items()}
        if state.shares and features:
            inputs["mm_encoder_outputs"] = as_argument(features)
        inputs |= {k: v.to(self.model.dtype) for k, v in inputs.items() if k in KINDS}
        if kwargs["do_sample"]:  # the same draws whatever was asked before
            torch.manual_seed(zlib.crc32(repr(which).encode()))
        targets = [targets_of(request, self.documents) for request in batch]
        method = state.method
        if isinstance(method, Oracle):
            method = replace(method, targets=[known or [] for known in targets])
        with method(self.model) as trace:
            output = self.model.generate(**inputs, **kwargs, pad_token_id=self.processor.tokenizer.pad_token_id)
            output = output[:, inputs["input_ids"].shape[1] :].tolist()
            visual = self._visual(prepared.inputs["input_ids"])
            averages = token_averages(trace, visual)
            notes = notes_of(trace, prepared.inputs["input_ids"], targets, self.processor.tokenizer)
        tokens_in = prepared.inputs["attention_mask"].sum(1).tolist()
        seconds = (seconds + time.perf_counter() - start) / len(batch)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        answers = []
        for i, request in enumerate(batch):
            context, _, _, doc_id, task, _ = request.args
            row = output[i]
            length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            text = clean(self.processor.decode(row[:length]), until)
            counts = (tokens_in[i], length, visual[i], *averages[i])
            answers.append(Answer(task, doc_id, context, text, *counts, seconds, notes[i]))
        return answers

    def _visual(self, ids: torch.Tensor) -> list[int]:
        tokens = [t for t in (self.processor.image_token_id, self.processor.video_token_id) if t is not None]
        return torch.isin(ids, torch.tensor(tokens)).sum(1).tolist()


def _documents(batch: Sequence[Instance]) -> tuple:
    return tuple((r.args[4], r.args[3]) for r in batch)


def _documents_of(batch: Sequence[Instance]) -> set:
    return set(_documents(batch))


def _lacks(state: RunState, batch: Sequence[Instance]) -> bool:
    """Whether a run has not answered all of a batch."""
    return not _documents_of(batch) <= state.answers.keys()


def token_averages(trace, visual: Sequence[int]) -> list[tuple[float, float]]:
    """(entering, leaving) per sample; a prompt that had nothing to drop left no record."""
    if not trace.prefills:
        return [(float(n), float(n)) for n in visual]
    record = trace.prefills[0]
    entering, leaving = record.entering, record.leaving
    beams = len(entering) // len(visual)
    return [(float(entering[i * beams]), float(leaving[i * beams])) for i in range(len(visual))]
