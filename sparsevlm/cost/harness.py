"""One round of measurements: every setting once, each beside its floor, and what does not change between rounds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from sparsevlm.cost import memory
from sparsevlm.cost.clocks import Mark, clock_for, cpu_ms
from sparsevlm.cost.counters import PROJECTOR, TOWERS, Prefill, countable, torch_gmacs, without_weights
from sparsevlm.cost.floor import floor, lengths_after
from sparsevlm.cost.flops import lengths_entering, prefill_gmacs, split
from sparsevlm.cost.shapes import Prompt
from sparsevlm.methods import build
from sparsevlm.runtime.parts import Marks, collect, watch
from sparsevlm.settings import Setting

UNPRUNED: Setting = ("none", "full", {})


@dataclass
class Sample:
    """One setting in one round; times in ms.

    Attributes:
        vision: tower and projector, without what the method does there.
        prefill: everything else from the pixels to the first logits: embedding, decoder layers, head, and all that
            pruning adds, wherever that is.
        prefill_cpu: CPU time of the process during `prefill`, all threads.
        decode: one token, mean over the steps.
        end_to_end: vision, prefill and all decode steps.
        unpruned, unpruned_vision: `prefill` and `vision` of the unpruned model in the same round.
        floor, floor_cpu: `prefill` and `prefill_cpu` of the floor in the same round; None where there is none.
        parts: what pruning spent where, in a prefill of its own; together the method's own time.
    """

    vision: float
    prefill: float
    prefill_cpu: float
    decode: float
    end_to_end: float
    unpruned: float | None = None
    floor: float | None = None
    floor_cpu: float | None = None
    unpruned_vision: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Facts:
    """What does not change from round to round.

    Attributes:
        lengths: all tokens of the first sample that enter each decoder layer.
        entering, leaving: mean visual tokens per layer.
        cuts: length from each layer on that follows a pruning point, for the floor; None = samples of unequal length.
        peak_bytes: largest memory of a prefill beside weights and inputs, see `memory.PEAK_MEASURE`.
        kv_bytes: memory of each layer's KV cache after it.
        gmacs: of the language model and the method per sample, by torch's counter; None if unknown beforehand.
    """

    lengths: list[int]
    entering: float
    leaving: float
    cuts: dict[int, int] | None
    peak_bytes: int
    kv_bytes: list[int]
    gmacs: float | None


class Harness:
    """Times settings of one model on one prompt. The first setting is the unpruned model.

    Args:
        net: a LLaVA, Video-LLaVA or Llama model where it shall run.
        settings: (method, budget, options) each, beside the unpruned one.
        prompt: see `shapes.make_prompt`.
        decode_tokens: decode steps per round.

    Raises:
        ValueError: an unknown method or option.
    """

    def __init__(self, net: nn.Module, settings: Sequence[Setting], prompt: Prompt, decode_tokens: int = 8):
        self.net, self.prompt, self.decode_tokens = net, prompt, decode_tokens
        self.settings = [UNPRUNED, *settings]
        self.pruners = [build(name, budget=budget, **options) for name, budget, options in self.settings]
        self.clock = clock_for(net.device)
        self.facts: dict[int, Facts] = {}
        self._vision_marks: list = []
        self._meta: nn.Module | None = None

    def pruned(self, i: int) -> AbstractContextManager:
        """The context of a setting; a text model is told where its visual tokens are."""
        told = self.prompt.visual_mask if "inputs_embeds" in self.prompt.inputs else None
        return self.pruners[i](self.net, visual_mask=told)

    def forward(self):
        """One prefill."""
        return self.net(**self.prompt.inputs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def inspect(self, i: int) -> Facts:
        """Run a setting once, slowly, and note what does not change."""
        if i in self.facts:
            return self.facts[i]
        kept = []
        with self.pruned(i) as trace:
            peak = memory.peak_bytes(lambda: kept.append(self.forward().past_key_values), self.net.device)
            record = trace.prefills[-1] if trace.prefills else None
        held = memory.kv_bytes(kept[0])
        n, cuts = float(self.prompt.visual_tokens), {}
        lengths, entering, leaving = [self.prompt.visual_mask.shape[1]] * len(held), n, n
        if record is not None:
            lengths = lengths_entering(record)
            entering, leaving = float(np.mean(record.entering)), float(np.mean(record.leaving))
            try:
                cuts = lengths_after(record)
            except ValueError:
                cuts = None
        self.facts[i] = Facts(lengths, entering, leaving, cuts, peak, held, self._gmacs(i))
        return self.facts[i]

    @torch.no_grad()
    def round(self, number: int, which: Sequence[int]) -> tuple[dict[int, Sample], dict[int, str]]:
        """Time the settings `which` once each, and the unpruned one.

        Returns:
            Samples of those that ran, and of the others why not (out of memory).
        """
        order = sorted({0, *which})
        start = number % len(order)
        samples, failed = {}, {}
        for i in order[start:] + order[:start]:
            try:
                samples[i] = self._sample(i, floor_first=bool(number % 2))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed[i] = "out of memory"
            if failed and self.net.device.type == "cuda":
                torch.cuda.empty_cache()
        for sample in samples.values():
            if 0 in samples:
                sample.unpruned, sample.unpruned_vision = samples[0].prefill, samples[0].vision
        return samples, failed

    def _sample(self, i: int, floor_first: bool) -> Sample:
        facts = self.inspect(i)
        has_floor = i > 0 and facts.cuts is not None
        least = self._time(floor(self.net, facts.cuts), 0) if has_floor and floor_first else None
        sample = self._time(self.pruned(i), self.decode_tokens)
        if has_floor:
            least = least or self._time(floor(self.net, facts.cuts), 0)
            sample.floor, sample.floor_cpu = least.prefill, least.prefill_cpu
        if i > 0:
            sample.parts = self._parts(i)
        return sample

    def _time(self, context: AbstractContextManager, decode_tokens: int) -> Sample:
        clock, marks = self.clock, self._vision_marks
        token = torch.zeros(len(self.prompt.visual_mask), 1, dtype=torch.long, device=self.net.device)
        token += 3  # any word will do: time does not depend on which one
        own = Marks(clock, only=("pictures",))  # what is not the tower's and the projector's in their spans
        with context, self._split(), watch(own.watch):
            marks.clear()
            clock.wait()
            start = clock.mark()
            out = self.forward()
            end = clock.mark()
            for _ in range(decode_tokens):
                out = self.net(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            last = clock.mark()
            clock.wait()
            spans = [*zip(marks[::2], marks[1::2], strict=True)]
        inside = [span[1:] for span in own.spans()]

        def models_own(ms: Callable[[Mark, Mark], float]) -> float:
            return sum(ms(a, b) for a, b in spans) - sum(ms(a, b) for a, b in inside)

        vision = models_own(clock.elapsed_ms)
        return Sample(
            vision=vision,
            prefill=clock.elapsed_ms(start, end) - vision,
            prefill_cpu=cpu_ms(start, end) - models_own(cpu_ms),
            decode=clock.elapsed_ms(end, last) / max(decode_tokens, 1),
            end_to_end=clock.elapsed_ms(start, last),
        )

    def _parts(self, i: int) -> dict[str, float]:
        """ms per part of pruning, of one prefill."""
        with self.pruned(i):
            self.clock.wait()
            with collect(self.clock) as seconds:
                self.forward()
        return {name: value * 1e3 for name, value in seconds.items()}

    @contextmanager
    def _split(self) -> Iterator[None]:
        """Mark where tower and projector start and end: before the first and after the last hook of the pruner, which
        has been entered."""
        parts = [getattr(self.net.model, name, None) for name in (*TOWERS, PROJECTOR)]
        hooks = []

        def mark(*_) -> None:
            self._vision_marks.append(self.clock.mark())

        for part in filter(None, parts):
            hooks.append(part.register_forward_pre_hook(mark, prepend=True))
            hooks.append(part.register_forward_hook(mark))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _gmacs(self, i: int) -> float | None:
        if self.pruners[i].adaptive:
            return None
        name, budget, options = self.settings[i]
        if self._meta is None:
            self._meta = without_weights(copy.deepcopy(self.net.config), self.net.dtype)
        inputs = {k: torch.empty_like(v[:1], device="meta") for k, v in self.prompt.inputs.items()}
        method = build(name, budget=budget, **options)
        with countable(self._meta), method(self._meta, visual_mask=self.prompt.visual_mask[:1]):
            prefill = Prefill(self._meta, tuple(inputs))
            return prefill_gmacs(split(torch_gmacs(prefill, tuple(inputs.values())), self._meta))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator raised it: a GPU's, or the CPU's, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
