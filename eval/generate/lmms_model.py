"""The model class that lmms-eval drives: batches of prompts through `generate()` with a pruning method installed.

From Python, with a loaded model:  SparseVLMAdapter(model=model, processor=processor, method=sparsevlm.build(...))
From lmms-eval's command line:     --model sparsevlm --model_args pretrained=mini,method=sparsevlm,budget=192,raters=all

It differs from lmms-eval's own LLaVA classes where those lose answers: an exception in generation ends the run (theirs
is logged and scored as an empty answer), memory that runs out makes the batches smaller, the task's generation
arguments are copied, and each answered batch can be written to a ledger.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence

import sparsevlm  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm

from eval.generate.features import FeatureStore
from eval.generate.generator import MAX_NEW_TOKENS, GenerationError, Generator, RunState, plan_batches
from eval.generate.ledger import Answer, Ledger
from eval.generate.stock import model_warnings, task_warnings
from eval.processes import resolve_device
from sparsevlm.methods.base import Method
from sparsevlm.models import Processor
from sparsevlm.models.checkpoint import EMBEDDED
from sparsevlm.settings import parse_value

__all__ = ["GenerationError", "SparseVLMAdapter"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


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
        dtype, revision, attn_implementation, prompt, image_aspect_ratio, min_pixels, max_pixels: see `sparsevlm.load`.
        max_batch_size: accepted because lmms-eval passes it; has no effect.
        ledger: where answers are kept and looked up.
        progress: called with the number of newly answered documents; default: a progress bar.
        feature_mb: main memory for visual features of pictures that several questions are about.

    Attributes:
        state: answers and failures so far.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "mini",
        method: str | Method = "none",
        budget: int | float | str | None = "full",
        batch_size: int | str = 1,
        max_new_tokens: int = MAX_NEW_TOKENS,
        device: str | None = None,
        max_batch_size: int | None = None,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        attn_implementation: str = "sdpa",
        prompt: str = "hub",
        image_aspect_ratio: str = "crop",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        model: torch.nn.Module | None = None,
        processor: Processor | None = None,
        ledger: Ledger | None = None,
        progress: Callable[[int], None] | None = None,
        feature_mb: int = 1024,
        **method_options,
    ) -> None:
        super().__init__()
        if isinstance(method, str):
            options = {k: parse_value(v) for k, v in method_options.items()}
            method = sparsevlm.build(method, budget=budget, **options)
        elif method_options:
            raise ValueError(f"the method is built already, so it takes no options: {', '.join(method_options)}")
        if model is None:
            model, processor = sparsevlm.load(
                pretrained,
                dtype=dtype,
                device=resolve_device(device or "auto"),
                attn_implementation=attn_implementation,
                revision=revision,
                prompt=prompt,
                image_aspect_ratio=image_aspect_ratio,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
            )
        self.model, self.processor, self.method = model, processor, method
        self._name = f"{pretrained}@{revision}" if revision else pretrained
        self._batch_size = int(batch_size)
        if self._batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        self._max_new_tokens, self._progress = max_new_tokens, progress
        self._features = FeatureStore(model, feature_mb << 20)
        self.state = RunState(method, ledger, self._batch_size)
        self._reported: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> SparseVLMAdapter:
        """lmms-eval's constructor; what the model arguments say wins over its own --batch_size and --device."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def __str__(self) -> str:
        """Names everything that changes answers: lmms-eval's response cache uses it as the model's identity."""
        processing = f"{self.processor.prompt}, {self.processor.image_aspect_ratio}, {self._max_new_tokens}"
        limits = [getattr(self.processor, name, None) for name in ("min_pixels", "max_pixels")]
        processing += "" if limits == [None, None] else f", {limits[0]} to {limits[1]} pixels"
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
            GenerationError: a document could not be answered; nothing is scored in its place.
        """
        state = self.state
        self._warn(requests)
        known = state.look_up(requests)
        advance, close = self._bar(len(requests), known)
        generator = Generator(self.processor, self._features, self.task_dict, max_new_tokens=self._max_new_tokens)
        try:
            generator.ask(plan_batches(requests, self._batch_size), [state], advance)
        finally:
            close()
        if state.error is not None:
            raise state.error
        plain = state.ledger is None  # under lmms-eval's own command line
        return [_result(state.answers[r.args[4], r.args[3]], plain) for r in requests]

    def _warn(self, requests: Sequence[Instance]) -> None:
        """Say what `eval.run` would do otherwise: each thing once, and nothing of the embedded models, which no paper
        evaluates."""
        if self.rank != 0:
            return
        model = (
            []
            if self._name in EMBEDDED
            else model_warnings(self.model.config.model_type, self.processor.prompt, self.processor.image_aspect_ratio)
        )
        for line in [*model, *task_warnings(requests)]:
            if line not in self._reported:
                print(line, file=sys.stderr, flush=True)
                self._reported.add(line)

    def _bar(self, total: int, done: int) -> tuple[Callable[[int], None], Callable[[], None]]:
        if self._progress is not None:
            self._progress(done)
            return self._progress, lambda: None
        interval = 0.1 if sys.stderr.isatty() else 10
        bar = tqdm(total=total, initial=done, desc="answers", mininterval=interval, disable=self.rank != 0)
        return bar.update, bar.close

    def loglikelihood(self, requests):
        raise NotImplementedError("lmms-eval 0.7.3 cannot score loglikelihood tasks; use the task's generation variant")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("multi-round tasks are not supported")


class Recorded(lmms):
    """Gives lmms-eval's evaluator answers that are known already; no model is needed to score them.

    Args:
        answers: by (task, doc_id), those of all requests.
    """

    is_simple = True

    def __init__(self, answers: Mapping[tuple[str, int | str], Answer]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        return [_result(self.answers[r.args[4], r.args[3]]) for r in requests]

    def clean(self) -> None:
        """Nothing is held."""

    loglikelihood = generate_until_multi_round = None


def _result(answer: Answer, plain: bool = False) -> GenerationResult:
    """An answer for lmms-eval; `plain` removes control characters, which its spreadsheet for MMBench refuses."""
    text = _CONTROL.sub("", answer.text) if plain else answer.text
    return GenerationResult(text, TokenCounts(answer.input_tokens, answer.output_tokens))
