"""How long a pruned prefill and a decode step take, measured so that settings can be compared.

All settings run in one process, interleaved: every round times each setting once, in an order that rotates from round
to round, so that a machine that slows down slows all of them. Reported are medians with quartiles, and ratios as the
median of the per-round ratios. Latency does not depend on what the weights are, only on shapes.

Beside each pruned prefill the same round times its floor (see `floor.py`): the same layers on the same lengths, with
the choice for free. Overhead = pruned / floor. Where pruning spends its time is measured in a prefill of its own, in
the same round, so that the marks of the parts do not slow the prefill that is reported.

One rule for all methods says what is whose: `vision` is the tower and the projector as they run, `prefill` everything
else from the pixels to the first logits, that is the language model and the method's own work wherever it does it, in
the tower and at the projector, too (`runtime.parts` marks it), and its guide, if it has one. Speed-up, ratio and
overhead compare prefills. A method that shortens the tower gains in `vision`; `first_token` is both together.

Clock: CUDA events on a GPU (device time, read after a synchronisation), the wall clock on a CPU; beside it the CPU time
of the process, as the operating system accounts for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from sparsevlm.cost import memory
from sparsevlm.cost.harness import UNPRUNED, Facts, Harness, Sample
from sparsevlm.cost.shapes import make_prompt
from sparsevlm.runtime.families import locate
from sparsevlm.runtime.parts import GUIDE
from sparsevlm.settings import Setting


class Rounds:
    """What has been timed so far; settings are numbered, 0 is the unpruned model.

    Override `note` to keep what is measured, and fill the members to resume an interrupted measurement.

    Attributes:
        samples: number of a round -> number of a setting -> its sample.
        facts: number of a setting -> what does not change between rounds.
        failed: number of a setting -> why it cannot run.
    """

    def __init__(self) -> None:
        self.samples: dict[int, dict[int, Sample]] = {}
        self.facts: dict[int, Facts] = {}
        self.failed: dict[int, str] = {}

    def note(self, number: int, samples: dict[int, Sample], facts: dict[int, Facts], failed: dict[int, str]) -> None:
        """Add what a round brought; rounds that are warm-up have negative numbers, and their samples are not kept."""
        self.facts |= facts
        self.failed |= failed
        if number >= 0:
            self.samples.setdefault(number, {}).update(samples)

    def lacks(self, number: int, setting: int) -> bool:
        """Return whether a setting is still to be timed in a round."""
        return setting not in self.failed and setting not in self.samples.get(number, {})


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
    layout: tuple[int, int] | None = None,
    rounds: Rounds | None = None,
) -> list[dict]:
    """Time prefill and decode of several settings, interleaved.

    A forward over the whole prompt (pixels and words, last position's logits) is timed and split: `vision_ms` is the
    tower and the projector; `prefill_ms` is everything else, that is embedding, decoder layers, output head and all
    that pruning adds, wherever it does; `first_token_ms` is their sum. `decode_ms` is the mean over `decode_tokens`
    greedy steps on the cache that the prefill left. `method_ms` is the method's own time, of the prefill in which its
    parts are timed.

    Args:
        model: a name for `sparsevlm.load`, or a LLaVA, Video-LLaVA or Llama model (random weights will do).
        methods: (method, budget, options) each; the unpruned model is put in front if it is not among them.
        text_tokens: all tokens of the prompt that are not visual.
        batch_size: equal prompts per forward, without padding.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that are not kept.
        decode_tokens: decode steps per round, at least 1.
        device: where to run; default: where the model is (a model loaded by name: the GPU if there is one).
        seed: of the random pixels and words.
        progress: called after each round with the number of rounds done and of all rounds, warm-up included.
        layout: text tokens before the visual ones, and visual tokens; the latter are free for text models only.
        rounds: what an earlier attempt has timed; settings that the memory does not hold are noted there, and the
            others go on.

    Returns:
        One dict per setting, in the order given: the setting (`method`, `budget`, `options`, defaults filled in),
        `batch_size`, `text_tokens`, `visual_tokens`; `failed`, why it could not run, or else what `summary` says, and
        in MB (10^6 bytes) `peak_mb`, the most that a prefill holds beside weights and inputs (`peak_measure` says how
        it is measured), and `kv_mb`, what its cache holds.

    Raises:
        ValueError: no rounds asked for, an unknown method or option, or a model of another family.
        RuntimeError: a setting that the memory does not hold, without `rounds`.
    """
    if repeats < 1 or warmup < 0 or decode_tokens < 1:
        raise ValueError(
            f"repeats={repeats}, warmup={warmup}, decode_tokens={decode_tokens}: at least 1, 0 and 1 are needed"
        )
    net = _on_device(model, device)
    before, visual = layout or (None, None)
    prompt = make_prompt(
        net.config, text_tokens, batch_size, net.device, net.dtype, seed, before=before, visual_tokens=visual
    )
    settings = list(methods) if any(name == "none" for name, _, _ in methods) else [UNPRUNED, *methods]
    others = [setting for setting in settings if setting[0] != "none"]
    harness = Harness(net, others, prompt, decode_tokens)
    timed = Rounds() if rounds is None else rounds
    harness.facts |= timed.facts
    for done in range(warmup + repeats):
        number = done - warmup
        wanted = [number] if number >= 0 else range(repeats)
        which = [i for i in range(len(others) + 1) if any(timed.lacks(n, i) for n in wanted)]
        if which:
            samples, failed = harness.round(done, which)
            if failed and rounds is None:
                names = ", ".join(harness.pruners[i].name for i in failed)
                raise RuntimeError(f"out of memory: {names}. Use a smaller batch or dtype")
            samples = {i: sample for i, sample in samples.items() if i in which}
            new = {i: harness.inspect(i) for i in samples if i not in timed.facts}
            timed.note(number, samples, new, {i: why for i, why in failed.items() if i in which})
        if progress is not None:
            progress(done + 1, warmup + repeats)
    index = {id(setting): i for i, setting in enumerate(others, 1)}
    places = [index.get(id(setting), 0) for setting in settings]
    shape = {"batch_size": batch_size, "text_tokens": text_tokens, "visual_tokens": prompt.visual_tokens}
    return [_row(harness, i, timed, repeats) | shape for i in places]


def _row(harness: Harness, i: int, timed: Rounds, repeats: int) -> dict:
    method = harness.pruners[i]
    row = {
        "method": method.name,
        "budget": method.budget if i else "full",
        "options": {k: v for k, v in asdict(method).items() if k != "budget"},
    }
    if i in timed.failed:
        return row | {"failed": timed.failed[i]}
    facts = timed.facts[i]
    return {
        **row,
        **summary([timed.samples[number][i] for number in range(repeats)], facts),
        "peak_measure": memory.PEAK_MEASURE[harness.net.device.type],
        "peak_mb": facts.peak_bytes / 1e6,
        "kv_mb": sum(facts.kv_bytes) / 1e6,
    }


def summary(samples: Sequence[Sample], facts: Facts) -> dict:
    """The rounds of one setting.

    Returns:
        Each as {"median", "q25", "q75"} over rounds: `prefill_ms`, `vision_ms`, `first_token_ms`, `decode_ms`,
        `end_to_end_ms`, `prefill_cpu_ms`; `prefill_ratio` (prefill / unpruned prefill of the same round) and
        `first_token_ratio` (the same of both), `floor_ms` and `overhead` (prefill / floor of the same round),
        `floor_cpu_ms` and `overhead_cpu` (the same in CPU time), None where there is nothing to compare with;
        `method_ms`, `guide_ms` (a second model of the method's, which `method_ms` leaves out), and `parts_ms`, one such
        dict per part of both. The facts. And `rounds`: for each of the times, the
        list of all rounds.
    """
    times = {
        f"{name}_ms": [getattr(s, name) for s in samples]
        for name in ("prefill", "vision", "decode", "end_to_end", "prefill_cpu", "floor", "floor_cpu", "unpruned")
    }
    rounds = {name: values for name, values in times.items() if None not in values}
    rounds["first_token_ms"] = [s.vision + s.prefill for s in samples]
    whole = [None if s.unpruned_vision is None else s.unpruned_vision + s.unpruned for s in samples]
    prefill = rounds["prefill_ms"]
    parts = sorted({name for s in samples for name in s.parts})
    return {
        **{name: _spread(rounds[name]) if name in rounds else None for name in times if name != "unpruned_ms"},
        "first_token_ms": _spread(rounds["first_token_ms"]),
        "prefill_ratio": _ratio(prefill, rounds.get("unpruned_ms")),
        "first_token_ratio": None if None in whole else _ratio(rounds["first_token_ms"], whole),
        "overhead": _ratio(prefill, rounds.get("floor_ms")),
        "overhead_cpu": _ratio(rounds["prefill_cpu_ms"], rounds.get("floor_cpu_ms")),
        "method_ms": _spread([sum(s.parts.values()) - s.parts.get(GUIDE, 0.0) for s in samples]),
        "guide_ms": _spread([s.parts.get(GUIDE, 0.0) for s in samples]),
        "parts_ms": {name: _spread([s.parts.get(name, 0.0) for s in samples]) for name in parts},
        **{k: v for k, v in asdict(facts).items() if k != "cuts"},
        "rounds": {name: values for name, values in rounds.items() if name != "unpruned_ms"},
    }


def _ratio(values: Sequence[float], to: Sequence[float] | None) -> dict[str, float] | None:
    return None if to is None else _spread([a / b for a, b in zip(values, to, strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    q25, median, q75 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q25": float(q25), "q75": float(q75)}


def _on_device(model: str | nn.Module, device: torch.device | str | None) -> nn.Module:
    if isinstance(model, str):
        import sparsevlm

        model, _ = sparsevlm.load(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    locate(model)
    return (model if device is None else model.to(device)).eval()
