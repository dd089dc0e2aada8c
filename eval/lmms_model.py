"""The model class that lmms-eval drives: batches of prompts through `generate()` with a pruning method installed.

From Python, with a loaded model:  SparseVLMAdapter(model=model, processor=processor, method=sparsevlm.build(...))
From lmms-eval's command line:     --model sparsevlm --model_args pretrained=mini,method=sparsevlm,budget=192,raters=all

It differs from lmms-eval's own LLaVA classes where those lose answers: an exception in generation ends the run (theirs
is logged and scored as an empty answer), the task's generation arguments are copied, and each answered batch can be
written to a ledger.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence

import sparsevlm  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import GenerationConfig

from eval.ledger import Answer, Ledger
from sparsevlm.methods.base import Method
from sparsevlm.models import Processor

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # openpyxl refuses them when mmbench writes its sheet
_KNOWN_BY_GENERATE = set(GenerationConfig().to_dict())
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class GenerationError(RuntimeError):
    """Preprocessing or generation failed; names the task and the documents."""


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
    """Cut an answer at the first stop string and strip control characters and surrounding white space."""
    for stop in until:
        text = text.split(stop)[0]
    return _CONTROL.sub("", text).strip()


class SparseVLMAdapter(lmms):
    """A vision-language model with a pruning method, as lmms-eval's `simple` kind of model.

    Args:
        pretrained: what to load (see `sparsevlm.load`) unless `model` and `processor` are given.
        method: name of a method or a built one; names take `budget` and further keywords as options. Options that are
            lists of integers may be written `1/2/6`, since lmms-eval splits its model arguments at commas.
        budget: see `sparsevlm.build`.
        batch_size: prompts per `generate()`; answers do not depend on it.
        max_new_tokens: for tasks that do not say.
        device: where to put the model; default: a GPU if there is one.
        dtype, revision, attn_implementation, prompt, image_aspect_ratio: see `sparsevlm.load`.
        max_batch_size: accepted because lmms-eval passes it; has no effect.
        ledger: where answers are kept and looked up.
        progress: called with the number of newly answered documents; default: a progress bar.

    Attributes:
        answers: (task, doc_id) -> Answer of everything answered so far.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "mini",
        method: str | Method = "none",
        budget: int | str | None = "full",
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        device: str | None = None,
        max_batch_size: int | None = None,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        attn_implementation: str = "sdpa",
        prompt: str = "hub",
        image_aspect_ratio: str = "crop",
        model: torch.nn.Module | None = None,
        processor: Processor | None = None,
        ledger: Ledger | None = None,
        progress: Callable[[int], None] | None = None,
        **method_options,
    ) -> None:
        super().__init__()
        if isinstance(method, str):
            options = {k: _integers(v) for k, v in method_options.items()}
            method = sparsevlm.build(method, budget=budget, **options)
        elif method_options:
            raise ValueError(f"the method is built already, so it takes no options: {', '.join(method_options)}")
        if model is None:
            model, processor = sparsevlm.load(
                pretrained,
                dtype=dtype,
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                attn_implementation=attn_implementation,
                revision=revision,
                prompt=prompt,
                image_aspect_ratio=image_aspect_ratio,
            )
        self.model, self.processor, self.method = model, processor, method
        self._name = f"{pretrained}@{revision}" if revision else pretrained
        self._batch_size = int(batch_size)
        if self._batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        self._max_new_tokens, self._ledger, self._progress = max_new_tokens, ledger, progress
        self.answers: dict[tuple[str, int | str], Answer] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> SparseVLMAdapter:
        """lmms-eval's constructor; what the model arguments say wins over its own --batch_size and --device."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def __str__(self) -> str:
        """Names everything that changes answers: lmms-eval's response cache uses it as the model's identity."""
        processing = f"{self.processor.prompt}, {self.processor.image_aspect_ratio}, {self._max_new_tokens}"
        return f"SparseVLMAdapter({self._name}, {self.model.dtype}, {processing}, {self.method!r})"

    def clean(self) -> None:
        """Keep the model: lmms-eval's version deletes it after the last request."""

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer all requests, in batches of the same generation arguments and similar length.

        Raises:
            GenerationError: anything that went wrong with a batch; nothing is scored in its place.
        """
        groups: dict[str, list[Instance]] = {}
        known = 0
        for request in requests:
            context, gen_kwargs, _, doc_id, task, _ = request.args
            answer = self._ledger.get(task, doc_id, context) if self._ledger is not None else None
            if answer is None:
                groups.setdefault(json.dumps(gen_kwargs, sort_keys=True, default=str), []).append(request)
            else:
                self.answers[task, doc_id] = answer
                known += 1
        advance, close = self._bar(len(requests), known)
        try:
            with self.method(self.model) as trace:
                for group in groups.values():
                    group.sort(key=lambda r: len(r.args[0]), reverse=True)  # out of memory? then at once
                    for start in range(0, len(group), self._batch_size):
                        batch = group[start : start + self._batch_size]
                        answers = self._answer(batch, trace)
                        if self._ledger is not None:
                            self._ledger.append(answers)
                        self.answers.update(((a.task, a.doc_id), a) for a in answers)
                        advance(len(batch))
        finally:
            close()
        ordered = [self.answers[r.args[4], r.args[3]] for r in requests]
        return [GenerationResult(a.text, TokenCounts(a.input_tokens, a.output_tokens)) for a in ordered]

    def _bar(self, total: int, done: int) -> tuple[Callable[[int], None], Callable[[], None]]:
        if self._progress is not None:
            self._progress(done)
            return self._progress, lambda: None
        interval = 0.1 if sys.stderr.isatty() else 10
        bar = tqdm(total=total, initial=done, desc="answers", mininterval=interval, disable=self.rank != 0)
        return bar.update, bar.close

    def _answer(self, batch: Sequence[Instance], trace) -> list[Answer]:
        try:
            return self._generate(batch, trace)
        except Exception as error:
            documents = ", ".join(str(r.args[3]) for r in batch)
            what = f"{type(error).__name__}: {error}"
            raise GenerationError(f"task {batch[0].args[4]}, documents {documents}: {what}") from error

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Instance], trace) -> list[Answer]:
        start = time.perf_counter()
        kwargs, until = generation_arguments(batch[0].args[1], self._max_new_tokens)
        questions, images = [], []
        for request in batch:
            context, _, doc_to_visual, doc_id, task, split = request.args
            questions.append(context)
            images.append(doc_to_visual(self.task_dict[task][split][doc_id]))
        inputs = self.processor(questions, images=images)
        visual = (inputs["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        tokens_in = inputs["attention_mask"].sum(1).tolist()
        inputs = inputs.to(self.device, self.model.dtype)
        trace.clear()
        pad = self.processor.tokenizer.pad_token_id
        output = self.model.generate(**inputs, **kwargs, pad_token_id=pad)
        output = output[:, inputs["input_ids"].shape[1] :].tolist()
        averages = token_averages(trace, visual)
        trace.clear()  # its records hold tensors
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        seconds = (time.perf_counter() - start) / len(batch)
        answers = []
        for i, request in enumerate(batch):
            context, _, _, doc_id, task, _ = request.args
            row = output[i]
            length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            text = clean(self.processor.decode(row[:length]), until)
            answers.append(Answer(task, doc_id, context, text, tokens_in[i], length, visual[i], *averages[i], seconds))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError("lmms-eval 0.7.3 cannot score loglikelihood tasks; use the task's generation variant")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("multi-round tasks are not supported")


def token_averages(trace, visual: Sequence[int]) -> list[tuple[float, float]]:
    """(entering, leaving) per sample; a prompt that had nothing to drop left no record."""
    if not trace.prefills:
        return [(float(n), float(n)) for n in visual]
    record = trace.prefills[0]
    entering, leaving = record.entering, record.leaving
    beams = len(entering) // len(visual)
    return [(float(entering[i * beams]), float(leaving[i * beams])) for i in range(len(visual))]


def _integers(value):
    """`"1/2/6"` -> [1, 2, 6]; everything else as it is."""
    listed = isinstance(value, str) and re.fullmatch(r"\d+(/\d+)+", value)
    return [int(v) for v in value.split("/")] if listed else value
