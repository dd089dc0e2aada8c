"""What a run really asks: digests of the rendered requests, and of what becomes of a prompt and a picture.

A run's settings are names (a task, a prompt, a padding); what stands behind a name can change. Both digests are part of
`RunSettings.identity`, so a run whose questions, conversation, stop strings or pixels would differ now is another run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from eval.errors import UserError, one_line
from eval.runs.model_settings import ModelSettings
from eval.tasks import TASKS, TaskSettings
from eval.tasks.generated import Generated
from eval.tasks.requests import load_questions, quiet
from sparsevlm.models.checkpoint import read_config
from sparsevlm.models.loading import read_processor

#: Generated questions depend on their seed and number alone, so the first ones show how all are asked.
_GENERATED = 18
_CONVERSATION = [
    {"role": "user", "content": "What is on the left, 1 or 2?\nAnswer briefly."},
    {"role": "assistant", "content": "No. 2"},
    {"role": "user", "content": "why"},
]
_LOADING = ("name", "pretrained", "revision", "dtype", "device", "attn_implementation")  # not the processor's
_DIGITS, _SAMPLED = 2, 8  # pixels are compared roughly, at few points: not bit for bit between machines


class Asks(Protocol):
    """What the digests depend on; `eval.runs.settings.RunSettings` is one."""

    @property
    def task(self) -> TaskSettings: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def max_new_tokens(self) -> int | None: ...
    @property
    def checkpoint(self) -> Path: ...
    @property
    def model(self) -> ModelSettings: ...


def asked(run: Asks) -> dict[str, str]:
    """What a run asks, for its identity: of equal content for runs that ask the same in the same way.

    Raises:
        UserError: the task or the processor cannot be loaded.
    """
    return {
        "requests": requests_digest(run.task, run.limit, run.max_new_tokens),
        "processing": processing_digest(run.checkpoint, run.model, TASKS[run.task.name].video),
        "lmms_eval": metadata.version("lmms-eval"),
    }


def forget() -> None:
    """Look at everything anew: called whenever a run is made of a configuration."""
    requests_digest.cache_clear()
    processing_digest.cache_clear()
    load_questions.cache_clear()


@cache
def requests_digest(task: TaskSettings, limit: int | None, max_new_tokens: int | None) -> str:
    """16 hexadecimal digits of all requests of a run: question texts, and how the answers are generated and cut."""
    from eval.generate.generator import MAX_NEW_TOKENS, generation_arguments

    quiet()
    if isinstance(TASKS[task.name], Generated):
        limit = min(TASKS[task.name].questions(limit), _GENERATED)
    _, questions = load_questions(task, limit, max_new_tokens)
    generation: dict[str, str] = {}

    def lines() -> Iterable[str]:
        for question in questions.values():
            for request in question.requests:
                context, gen_kwargs, _, doc_id, name, _ = request.args
                given = json.dumps(gen_kwargs, sort_keys=True, default=str)
                if given not in generation:
                    arguments = generation_arguments(gen_kwargs, MAX_NEW_TOKENS)
                    generation[given] = json.dumps(arguments, sort_keys=True, default=str)
                yield json.dumps([name, doc_id, context, generation[given]])

    return _digest(line.encode() + b"\n" for line in lines())


@cache
def processing_digest(checkpoint: Path, model: ModelSettings, video: bool) -> str:
    """16 hexadecimal digits of the token ids of a sample conversation and of the pixels of a sample picture or clips.

    Raises:
        UserError: the checkpoint's processor cannot be made with these settings.
    """
    options = {k: v for k, v in vars(model).items() if k not in _LOADING}
    try:
        processor = read_processor(checkpoint, read_config(checkpoint), **options)
        shown = [{"videos": frames} for frames in _clips()] if video else [{"images": _picture()}]
        inputs = [processor(question, **media) for media in shown for question in (_CONVERSATION, "what")]
    except (ValueError, OSError) as error:
        raise UserError(f"cannot load the model {model.name}: {one_line(error)}") from error
    return _digest(json.dumps(_roughly(tensor)).encode() for made in inputs for _, tensor in sorted(dict(made).items()))


def _roughly(tensor: torch.Tensor) -> list:
    """Token ids as they are; of pixels [..., H, W] a grid of points with two digits."""
    if not tensor.is_floating_point():
        return tensor.tolist()
    step = max(1, tensor.shape[-1] // _SAMPLED)
    points = tensor[..., step // 2 :: step, step // 2 :: step].double().numpy()
    return (np.round(points, _DIGITS) + 0.0).tolist()  # no -0.0


def _picture() -> Image.Image:
    """Noise, wider than high: whatever is resized, padded or cropped otherwise changes it."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (120, 200, 3), dtype=np.uint8))


def _clips() -> list[np.ndarray]:
    """A long and a short clip, uint8 [T, H, W, 3]."""
    return [np.random.RandomState(n).randint(0, 256, (n, 60, 100, 3), dtype=np.uint8) for n in (21, 5)]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
