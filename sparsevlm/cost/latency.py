"""How long a pruned prefill and a decode step take, measured so that settings can be compared.

All settings run in one process, interleaved: every round times each setting once, in an order that rotates from round
to round, so that a machine that slows down slows all of them. Reported are medians with quartiles, and the ratio to the
unpruned model as the median of the per-round ratios. Latency does not depend on what the weights are, only on shapes.

Clock: CUDA events on a GPU (device time, read once per setting after a synchronisation), `time.perf_counter` on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import nn

from sparsevlm.cost.shapes import Prompt, make_prompt
from sparsevlm.methods import build
from sparsevlm.methods.base import Method

UNPRUNED = ("none", "full", {})
Setting = tuple[str, int | str | None, dict]


@torch.no_grad()
def measure(
    model: str | nn.Module,
    methods: Sequence[Setting],
    text_tokens: int,
    batch_size: int = 1,
    repeats: int = 20,
    warmup: int = 3,
    decode_tokens: int = 8,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Time prefill and decode of several settings, interleaved.

    A forward over the whole prompt (pixels and words, last position's logits) is timed and split: `vision_ms` is the
    tower and the projector; `prefill_ms` is everything else, that is embedding, decoder layers, output head and all
    that pruning adds. `decode_ms` is the mean over `decode_tokens` greedy steps on the cache that the prefill left.

    Args:
        model: a name for `sparsevlm.load`, or a LLaVA or Video-LLaVA model (random weights will do).
        methods: (method, budget, options) each; the unpruned model is put in front if it is not among them.
        text_tokens: all tokens of the prompt that are not visual.
        batch_size: equal prompts per forward, without padding.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that are not kept.
        decode_tokens: decode steps per round, at least 1.
        device: where to run; default: where the model is (a model loaded by name: the GPU if there is one).
        seed: of the random pixels and words.
        progress: called after each round with the number of rounds done and of all rounds, warm-up included.

    Returns:
        One dict per setting, in the order given: `method`, `budget`, `options` (all of the method's, defaults filled
        in), `batch_size`, `text_tokens`, `visual_tokens`, `entering`, `leaving` (mean visual tokens per layer),
        `prefill_ms`, `vision_ms`, `decode_ms` and `prefill_ratio` (prefill / unpruned prefill of the same round), each
        of these four as {"median", "q25", "q75"}, and `rounds`: for the three times, the list of all timed rounds in
        ms.

    Raises:
        ValueError: no rounds asked for, an unknown method or option, or a model of another family.
    """
    if repeats < 1 or warmup < 0 or decode_tokens < 1:
        raise ValueError(
            f"repeats={repeats}, warmup={warmup}, decode_tokens={decode_tokens}: at least 1, 0 and 1 are needed"
        )
    settings = list(methods)
    if not any(name == "none" for name, _, _ in settings):
        settings.insert(0, UNPRUNED)
    pruners = [build(name, budget=budget, **options) for name, budget, options in settings]
    net = _on_device(model, device)
    prompt = make_prompt(net.config, text_tokens, batch_size, net.device, net.dtype, seed)
    samples = [_Samples() for _ in settings]
    clock = _CudaClock() if net.device.type == "cuda" else _CpuClock()
    with _split_forward(net, clock):
        for done in range(warmup + repeats):
            for i in _rotated(len(settings), done):
                sample = _time_once(net, pruners[i], prompt, clock, decode_tokens)
                if done >= warmup:
                    samples[i].add(sample)
            if progress is not None:
                progress(done + 1, warmup + repeats)
    unpruned = next(s for s, (name, _, _) in zip(samples, settings, strict=True) if name == "none")
    return [
        _row(pruner, sample, unpruned, text_tokens, batch_size, prompt.visual_tokens)
        for pruner, sample in zip(pruners, samples, strict=True)
    ]


@dataclass
class _Samples:
    """The timed rounds of one setting, in ms, and the token averages its trace reported."""

    prefill: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    entering: float = 0.0
    leaving: float = 0.0

    def add(self, sample: tuple[float, float, float, float, float]) -> None:
        prefill, vision, decode, self.entering, self.leaving = sample
        self.prefill.append(prefill)
        self.vision.append(vision)
        self.decode.append(decode)


class _CpuClock:
    def __init__(self) -> None:
        self.vision_marks: list = []

    def mark(self):
        return time.perf_counter()

    def elapsed_ms(self, start, end) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        """Nothing to wait for: CPU operators return when they are done."""


class _CudaClock(_CpuClock):
    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


def _time_once(net, pruner, prompt: Prompt, clock: _CpuClock, decode_tokens: int):
    """Prefill, vision and decode ms of one setting, and both token averages."""
    token = prompt.inputs["input_ids"][:, -1:]  # any word will do: time does not depend on which one
    with pruner(net) as trace:
        clock.vision_marks.clear()
        clock.wait()
        start = clock.mark()
        out = net(**prompt.inputs, use_cache=True, logits_to_keep=1)
        end = clock.mark()
        for _ in range(decode_tokens):
            out = net(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        last = clock.mark()
        clock.wait()
        marks = clock.vision_marks
        vision = sum(clock.elapsed_ms(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True))
        prefill = clock.elapsed_ms(start, end) - vision
        decode = clock.elapsed_ms(end, last) / decode_tokens
        record = trace.prefills[-1] if trace.prefills else None
    if record is None:
        return prefill, vision, decode, float(prompt.visual_tokens), float(prompt.visual_tokens)
    return prefill, vision, decode, float(np.mean(record.entering)), float(np.mean(record.leaving))


@contextmanager
def _split_forward(net: nn.Module, clock: _CpuClock):
    """Mark where tower and projector start and end. Installed before the pruner: its hooks on them run inside."""
    parts = [getattr(net.model, n, None) for n in ("vision_tower", "video_tower", "multi_modal_projector")]
    hooks = []
    for part in filter(None, parts):
        hooks.append(part.register_forward_pre_hook(lambda *_: clock.vision_marks.append(clock.mark())))
        hooks.append(part.register_forward_hook(lambda *_: clock.vision_marks.append(clock.mark())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on_device(model: str | nn.Module, device: torch.device | str | None) -> nn.Module:
    if isinstance(model, str):
        import sparsevlm

        model, _ = sparsevlm.load(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not hasattr(getattr(model, "model", None), "multi_modal_projector"):
        raise ValueError(f"cannot time a {type(model).__name__}: give a LLaVA or Video-LLaVA model")
    return (model if device is None else model.to(device)).eval()


def _rotated(n: int, start: int) -> list[int]:
    return [(start + i) % n for i in range(n)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    q25, median, q75 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q25": float(q25), "q75": float(q75)}


def _row(pruner: Method, own: _Samples, unpruned: _Samples, text_tokens, batch_size, visual_tokens) -> dict:
    return {
        "method": pruner.name,
        "budget": pruner.budget,
        "options": {name: value for name, value in asdict(pruner).items() if name != "budget"},
        "batch_size": batch_size,
        "text_tokens": text_tokens,
        "visual_tokens": visual_tokens,
        "entering": own.entering,
        "leaving": own.leaving,
        "prefill_ms": _spread(own.prefill),
        "vision_ms": _spread(own.vision),
        "decode_ms": _spread(own.decode),
        "prefill_ratio": _spread([a / b for a, b in zip(own.prefill, unpruned.prefill, strict=True)]),
        "rounds": {"prefill_ms": own.prefill, "vision_ms": own.vision, "decode_ms": own.decode},
    }
