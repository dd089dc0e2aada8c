"""One forward that brings visual tokens: decides which stay, gathers them, and keeps masks and positions in step."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sparsevlm.budget import Schedule
from sparsevlm.core.packing import take
from sparsevlm.core.precision import at_least_float32
from sparsevlm.core.recycling import recycled_counts
from sparsevlm.core.scores import causal_bias, rank_by_score
from sparsevlm.runtime import records
from sparsevlm.runtime.bias import LogitBias
from sparsevlm.runtime.cache_guard import report_seen_tokens
from sparsevlm.runtime.cache_state import (
    Segment,
    cached_length,
    earlier_state,
    extended,
    state_of,
    whole,
)
from sparsevlm.runtime.decision import Decision
from sparsevlm.runtime.early import can_drop_early, drop_early
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.gate import gate_prefill, pictured, visible
from sparsevlm.runtime.masks import FixedMask, SegmentMasks
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.places import key_places, renumber, take_rope
from sparsevlm.runtime.prompt import Prompt
from sparsevlm.runtime.rows import Block, HasRows, column, first_rows
from sparsevlm.runtime.stage import Handed, Stage
from sparsevlm.runtime.trace import PrefillRecord, StageRecord


class Prefill(HasRows):
    """State of one such forward; everything describes the sequence as it enters the layer being computed.

    CONTRIBUTING.md lists what methods may use of it.

    How many rows each sample has is known to the host, so no device value is waited for.

    Attributes (L = current length):
        rows: where the visual tokens are.
        tokens: rows per sample, padding excluded.
        source: [B, L] int64, index of each row in the call's input; None = the row's own.
        merged_sources: per stage so far the `source` [B, n] of its merged tokens (-1 = none).
        earlier: pruning state of the cache as earlier turns left it; None = they left none.
        places: [B, L] int64, index of each row less that of the token after the call, where sliding windows count in
            indices; None = rows come one after the other.
        tables: [1 or B, L, 2 d] cos and sin side by side of the current rows; None = those of the call.
        key_mask: [B, cached + L] bool of the current segment, None = no padding.
        attached: what `method.attach` made of the model.
        scratch: what the method remembers of this prompt.
        entered: [B, L, D] states that entered the last pruning layer, for methods with `scores_entered`.
        raters: [B, tail] bool over the last `tail` tokens; weights: the same as float32, summing to one.
    """

    def __init__(self, method, attached, family: Family, prompt: Prompt, hidden: Tensor, kwargs: dict, cache, key_mask):
        self.method, self.attached, self.family, self.prompt, self.cache = method, attached, family, prompt, cache
        self.scratch: dict[str, Any] = {}
        self.entered: Tensor | None = None
        self.device = device = hidden.device
        self.batch = hidden.shape[0]
        self.tail = prompt.tail  # number of last positions among which the text after the last visual token lies
        self.misaligned = any(prompt.trailing)  # padding on the right, until the first gather
        self.tokens = prompt.real.sum(1).tolist()
        self.numbers = torch.arange(hidden.shape[1], device=device)
        self.rows = first_rows(prompt, self.numbers)
        layers = family.n_layers
        self.schedules = [
            method.schedule(n, layers, attached) if n else Schedule(0, layers, (), (), (), ()) for n in self.n_visual
        ]
        self._check_something_stays()
        self.gated = method.gated_layer(attached)
        self.points = sorted({layer for s in self.schedules for layer in s.layers})
        self.text_valid = None if prompt.text.all() else torch.from_numpy(prompt.text).to(device)
        self.source: Tensor | None = None
        self.merged_sources: list[Tensor] = []
        self.call_positions, self.call_rope = kwargs["position_ids"], kwargs["position_embeddings"]
        self.tables: Tensor | None = None
        self.places: Tensor | None = None
        self.shift = state_of(cache).at(0).shift if getattr(cache, "sparsevlm", None) is not None else 0
        self.key_mask = key_mask if prompt.padded else None
        self.earlier = earlier_state(cache)
        self.raters: Tensor | None = None
        self.weights: Tensor | None = None
        self.handed: Handed | None = None  # what scoring computed of the layer that comes next
        self.segment_masks: SegmentMasks | FixedMask | None = None  # None: the model's own masks and positions hold
        self._bias: Tensor | None = None
        self._lowest: Tensor | None = None
        self.pending: Decision | None = None
        self.renumbered = False
        self.record = PrefillRecord(list(prompt.n_visual), list(self.tokens), family.n_layers)
        asked = method.budget if isinstance(method.budget, int) else 0
        self.record.clamped = [0 < n < asked for n in prompt.n_visual]
        with part("raters"):
            method.begin(self, hidden)

    def _check_something_stays(self) -> None:
        """Raise ValueError if a prompt would lose all of its tokens."""
        for schedule, n, tokens in zip(self.schedules, self.n_visual, self.tokens, strict=True):
            if n == tokens and 0 in schedule.after:
                raise ValueError(
                    f"method {self.method.name!r} drops all visual tokens in the end, and a prompt of nothing else is "
                    "in the batch. Use prompts with text, or a method that keeps some"
                )

    # ---- for methods -----------------------------------------------------------------------------------------------
    @property
    def length(self) -> int:
        """Current rows."""
        return self.rows.length

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """cos, sin [1 or B, L, d] of the current rows."""
        return self.call_rope if self.tables is None else self.tables.chunk(2, -1)

    @cached_property
    def call_tables(self) -> Tensor:
        """[1 or B, L0, 2 d] cos and sin of the call's rows side by side, to be gathered in one go."""
        return torch.cat(self.call_rope, -1)

    @property
    def visual_flag(self) -> Tensor:
        """[B, L] bool, whether a row is a visual token."""
        return self.rows.flag

    def set_raters(self, raters: Tensor) -> None:
        """Declare the raters, [B, tail] bool over the last `tail` tokens; `weights` average over them."""
        self.raters = raters
        dtype = at_least_float32(self.call_rope[0].dtype)
        count = raters.sum(1, keepdim=True)
        if not self.prompt.text.any(1).all():
            count.clamp_(min=1)  # a sample without text
        self.weights = raters.to(dtype).div_(count)
        self.record._raters = partial(records.rater_positions, raters, self.length, self.n_visual)

    def cached_keys(self, layer: int) -> Tensor | None:
        """Rotated keys of earlier turns of a layer [B, H_kv, cached, d]; None in a first turn."""
        length = cached_length(self.cache, layer)
        return self.cache.layers[layer].keys[:, :, :length] if length else None

    def cached_values(self, layer: int) -> Tensor | None:
        """Values of earlier turns of a layer [B, H_kv, cached, d]; None in a first turn."""
        length = cached_length(self.cache, layer)
        return self.cache.layers[layer].values[:, :, :length] if length else None

    def bias(self, tail: int, length: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """`causal_bias` of the last `tail` rows of `length` keys, made once for all stages."""
        made = self._bias
        if window is not None or made is None or made.shape[0] != tail or made.shape[1] < length:
            made = self._bias = causal_bias(tail, length, dtype, self.device, window)
        return made[:, made.shape[1] - length :]

    def lowest(self, dtype: torch.dtype) -> Tensor:
        """Scalar: what a mask adds to logits of keys that a row does not see."""
        if self._lowest is None:
            self._lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return self._lowest

    # ---- the course of a forward -----------------------------------------------------------------------------------
    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """Called before each layer with its input [B, L, D]; returns what the layer shall compute."""
        if hidden.device != self.device:
            self._to(hidden.device)
        decision, self.pending, self.handed = self.pending, None, None
        if layer - 1 in self.points and (layer == 0 or self.method.scores_next):
            decision = self._decide(self._stage(layer - 1, layer, hidden))
        if decision is not None:
            with part("gathering"):
                hidden = self._apply(decision, hidden)
        elif self.cache is not None and state_of(self.cache).starts_own_masks(layer):  # an earlier turn was pruned here
            with part("masks"):
                self._begin_segment(layer, hidden)
        if layer == self.gated:
            self._gate(layer, hidden, decision is not None)
        if layer in self.points and not self.method.scores_next:
            stage = self._stage(layer, layer, hidden)
            self.pending = self._decide(stage)
            if self.pending is not None and can_drop_early(self, self.pending, stage):
                with part("gathering"):
                    hidden, self.pending = drop_early(self, self.pending, stage)
            elif stage.computed is not None and not torch.is_grad_enabled():
                self.handed = Handed.whole(stage.computed)
        if self.method.scores_entered and layer in self.points:
            self.entered = hidden
        return hidden

    def _gate(self, layer: int, hidden: Tensor, begun: bool) -> None:
        """Let generated tokens see of each other what was written; from here on caches have masks of their own."""
        mask = gate_prefill(self, hidden)
        with part("masks"):
            if mask is not None:
                self.key_mask = mask
                places = key_places(self, 0, Segment())
                self.segment_masks = SegmentMasks(self.family, mask, None, self.rope, places=places)
            elif self.cache is not None:
                if not begun:
                    self._begin_segment(layer, hidden)
                state, now = state_of(self.cache), pictured(self)
                state.pictured = now if state.pictured is None else state.pictured.to(now.device) | now

    def _stage(self, layer: int, module: int, hidden: Tensor) -> Stage:
        return Stage(self, layer, module, hidden, self.rows)

    def _decide(self, stage: Stage) -> Decision | None:
        """Score and select at one pruning point; None if nothing is dropped there."""
        keep = None if self.method.adaptive else self.method.keep_counts(stage)
        scores = order = None
        if keep != stage.n_visual:
            with part("scores"):
                scores = self.method.score(stage)
            with part("selection"):
                order = rank_by_score(scores, self.rows.valid)
                if keep is None:
                    keep = self.method.keep_counts(stage)
        else:
            with part("scores"):
                self.method.keep_all(stage)
        counts = self._recycling(stage, keep)
        pool, merged = [p for p, _ in counts], [m for _, m in counts]
        self._log(stage, scores, order, keep, merged)
        if keep == stage.n_visual:
            return None
        uniform = self.rows.valid is None and len({*zip(keep, pool, merged, strict=True)}) == 1
        return Decision(stage.layer, order, keep, pool, merged, uniform)

    def _recycling(self, stage: Stage, keep: list[int]) -> list[tuple[int, int]]:
        if self.method.adaptive:
            share, cluster = self.method.recycle, self.method.cluster
            return [recycled_counts(n - k, share, cluster) for n, k in zip(stage.n_visual, keep, strict=True)]
        return [s.at(stage.layer, n)[1:] for s, n in zip(self.schedules, stage.n_visual, strict=True)]

    def _log(self, stage: Stage, scores, order, keep: list[int], merged: list[int]) -> None:
        whole = [n - c for n, c in zip(self.prompt.n_visual, self.prompt.counts, strict=True)]  # left alone
        now = (self.rows, self.source, tuple(self.merged_sources), self.prompt.visual)
        details = partial(records.stage_details, scores, order, keep, stage.n_visual, whole, *now)
        tokens_in = [n + w for n, w in zip(stage.n_visual, whole, strict=True)]
        tokens_out = [k + m + w for k, m, w in zip(keep, merged, whole, strict=True)]
        positions = self.family.positions_after(self.method, stage.layer)
        self.record.stages.append(StageRecord(stage.layer, tokens_in, tokens_out, list(merged), details, positions))
        self.method.annotate(self.record.stages[-1], self)

    def _apply(self, d: Decision, hidden: Tensor) -> Tensor:
        """Drop, merge and reorder: from the rows of one segment to those of the next."""
        original = self.family.positions_after(self.method, d.layer) == "original"
        hidden = self.method.before_drop(self, d.layer, hidden)
        if isinstance(self.rows, Block):
            if not d.uniform:
                self.rows = self.rows.scattered()
            elif d.order is not None:
                index, d = self.select(d, rope=original)
                hidden = take(hidden, index)
        left = [k + m for k, m in zip(d.keep, d.merged, strict=True)]
        self.tokens = [t - n + x for t, n, x in zip(self.tokens, self.n_visual, left, strict=True)]
        length = self.length
        real = None if self.key_mask is None else self.key_mask[:, -length:]
        made = self.rows.merge(d, hidden, self.source, self.method, self.tokens, real)
        self.rows, self.source = made.rows, made.source
        if made.merged is not None:
            self.merged_sources.append(made.merged)
        if original and made.follow is not None:
            take_rope(self, made.follow(), length)
        self._align_text()
        with part("masks"):
            self._begin_segment(d.layer + 1, made.hidden)
        return made.hidden

    def select(self, d: Decision, rope: bool) -> tuple[Tensor, Decision]:
        """Let only the rows go on that survive: kept tokens, recycling candidates and text.

        Returns:
            these rows [B, N], and the decision in terms of them.
        """
        length = self.length
        index, self.rows, d = self.rows.select(d)
        self.tokens = [t - (length - self.length) for t in self.tokens]
        if self.key_mask is not None:
            self.key_mask = self.key_mask[:, -length:].gather(1, index)
        self.source = index if self.source is None else self.source.gather(1, index)
        if rope:
            take_rope(self, index, length)
        return index, d

    def _align_text(self) -> None:
        """After the first gather right padding has moved to the left, and the text to the right by as much."""
        if not self.misaligned:
            return
        self.misaligned = False
        tail, self.tail = self.tail, self.prompt.aligned_tail
        index = torch.arange(tail - self.tail, tail, device=self.device) - column(self.prompt.trailing, self.device)
        for name in ("weights", "text_valid"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0))

    def _begin_segment(self, layer: int, hidden: Tensor) -> None:
        """From `layer` on the caches hold the current rows: masks and positions for its layers, state on the cache."""
        padding = [self.length - t for t in self.tokens]
        real = self.numbers[: self.length] >= column(padding, self.device) if any(padding) else None
        cached = cached_length(self.cache, layer)
        segment = state_of(self.cache).split(layer) if self.cache is not None else None
        # not of `segment`: a new one begins with what this call has made of the one before
        before = self.earlier.at(layer) if cached and self.earlier is not None else Segment()
        shift = before.shift
        held = before.key_mask if before.gate is None else visible(before.key_mask, before.gate[:, :cached])
        self.key_mask = extended(held, cached, real, self.batch, self.length, hidden.device)
        if layer == 0 and segment is not None:
            state = state_of(self.cache)
            state.dropped_at_input = (state.dropped_at_input or 0) + self.prompt.length - self.length
            report_seen_tokens(self.cache)
        if self.family.positions_after(self.method, layer - 1) == "renumber":
            shift = renumber(self, padding, shift, hidden)
            self.renumbered, self.places = True, None
        elif self.renumbered and segment is not None:  # at an earlier stage of this call: the positions stay as there
            shift = state_of(self.cache).at(layer - 1).shift
        self.shift = shift
        places = key_places(self, cached, before)
        bias = self._logit_bias(layer, before.bias, cached)
        if segment is not None:
            segment.bias = bias and bias.keys_only()
            segment.key_mask, segment.shift = whole(self.key_mask, self.cache, layer), shift
            segment.places, segment.gate = places, None  # what was gated before is masked for good
        self.segment_masks = SegmentMasks(self.family, self.key_mask, self.cache, self.rope, places=places, bias=bias)

    def _logit_bias(self, layer: int, before: LogitBias | None, cached: int) -> LogitBias | None:
        """What is added to the logits of all layers from `layer` on; `before`: what earlier turns left there."""
        bias = self.method.logit_bias(self) if layer == 0 else None
        if bias is None and before is not None:
            none = torch.zeros(self.batch, self.length, device=self.device)
            bias = LogitBias(none, none)
        return bias and bias.after(before, cached)

    def _to(self, device: torch.device) -> None:
        """Follow the states to another device (models spread over several)."""
        self.device = device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.rows = self.rows.to(device)
        self.call_rope = tuple(t.to(device) for t in self.call_rope)
