"""One forward that brings visual tokens: decides which stay, gathers them, and keeps masks and positions in step."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparsevlm.budget import Schedule
from sparsevlm.core.packing import pack, take
from sparsevlm.core.recycling import recycled_counts
from sparsevlm.core.scores import rank_by_score
from sparsevlm.runtime import records
from sparsevlm.runtime.cache_state import cached_length, extended, report_seen_tokens, state_of
from sparsevlm.runtime.decision import Decision
from sparsevlm.runtime.early import can_drop_early, drop_early
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.masks import SegmentMasks
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.prompt import Prompt
from sparsevlm.runtime.stage import ModuleInputs, Stage
from sparsevlm.runtime.trace import PrefillRecord, StageRecord


class Prefill:
    """State of one such forward; everything describes the sequence as it enters the layer being computed.

    Each token gets a sort key: its index, -1 if it is dropped, and a place among the others if it is a merged one.
    Sorting the keys drops, orders and left-pads in one go; states and positions follow by gathers. How many rows each
    sample has is known to the host, so no device value is waited for.

    Attributes (L = current length, V = largest current number of visual tokens):
        tokens: rows per sample, padding excluded.
        n_visual: visual tokens per sample (0: the sample is left alone).
        visual_flag [B, L], visual_index [B, V], visual_valid [B, V] or None: where they are.
        visual_end: [B, 1] the row that merged tokens follow, where that is not the last visual one (early drop).
        source: [B, L] int64, index of each row in the call's input.
        merged_sources: per stage so far the `source` [B, n] of its merged tokens (-1 = none).
        rope: cos, sin [1 or B, L, d] of the current rows.
        key_mask: [B, cached + L] bool of the current segment, None = no padding.
        raters: [B, tail] bool over the last `tail` tokens; weights: the same as float32, summing to one.
    """

    def __init__(self, method, family: Family, prompt: Prompt, hidden: Tensor, kwargs: dict, cache, key_mask):
        self.method, self.family, self.prompt, self.cache = method, family, prompt, cache
        self.device = device = hidden.device
        self.batch, self.length = hidden.shape[:2]
        self.tail = prompt.tail  # number of last positions among which the text after the last visual token lies
        self.misaligned = any(prompt.trailing)  # padding on the right, until the first gather
        self.tokens = prompt.real.sum(1).tolist()
        self.n_visual = prompt.counts
        layers = family.n_layers
        self.schedules = [method.plan(n, layers) if n else Schedule(0, layers, (), (), (), ()) for n in self.n_visual]
        self.points = sorted({layer for s in self.schedules for layer in s.layers})
        width = max(self.n_visual)
        self.visual_index = torch.from_numpy(prompt.index(width)).to(device)
        self.visual_valid = None
        if min(self.n_visual) != width:
            self.visual_valid = torch.arange(width, device=device) < self._column(self.n_visual)
        self.visual_flag = torch.from_numpy(prompt.visual).to(device)
        self.visual_end: Tensor | None = None
        self.text_valid = None if prompt.text.all() else torch.from_numpy(prompt.text).to(device)
        self.source = torch.arange(self.length, device=device).expand(self.batch, -1)
        self.merged_sources: list[Tensor] = []
        self.call_positions, self.call_rope = kwargs["position_ids"], kwargs["position_embeddings"]
        self.rope = self.call_rope
        self.key_mask = key_mask if prompt.padded else None
        self.raters: Tensor | None = None
        self.weights: Tensor | None = None
        self.handed: ModuleInputs | None = None  # what scoring made of the layer that comes next
        self.segment_masks: SegmentMasks | None = None  # None: the model's own masks and positions hold
        self.pending: Decision | None = None
        self.renumbered = False
        self.record = PrefillRecord(list(prompt.n_visual), list(self.tokens), family.n_layers)
        with part("raters"):
            method.begin(self, hidden)

    # ---- for methods -----------------------------------------------------------------------------------------------
    def set_raters(self, raters: Tensor) -> None:
        """Declare the raters, [B, tail] bool over the last `tail` tokens; `weights` average over them."""
        self.raters = raters
        dtype = torch.promote_types(self.call_rope[0].dtype, torch.float32)
        self.weights = raters.to(dtype) / raters.sum(1, keepdim=True).clamp(min=1)
        self.record._raters = partial(records.rater_positions, raters, self.length, self.n_visual)

    def cached_keys(self, layer: int) -> Tensor | None:
        """Rotated keys of earlier turns of a layer [B, H_kv, cached, d]; None in a first turn."""
        length = cached_length(self.cache, layer)
        return self.cache.layers[layer].keys[:, :, :length] if length else None

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
        if layer in self.points and not self.method.scores_next:
            stage = self._stage(layer, layer, hidden)
            self.pending = self._decide(stage)
            if self.pending is not None and can_drop_early(self, self.pending, stage):
                with part("gathering"):
                    hidden, self.pending = drop_early(self, self.pending, stage)
            elif stage.computed is not None and not torch.is_grad_enabled():
                self.handed = stage.computed
        return hidden

    def _stage(self, layer: int, module: int, hidden: Tensor) -> Stage:
        return Stage(self, layer, module, hidden, list(self.n_visual), self.visual_index, self.visual_valid)

    def _decide(self, stage: Stage) -> Decision | None:
        """Score and select at one pruning point; None if nothing is dropped there."""
        keep = None if self.method.adaptive else self.method.keep_counts(stage)
        scores = order = None
        if keep != stage.n_visual:
            with part("scores"):
                scores = self.method.score(stage)
            with part("selection"):
                order = rank_by_score(scores, self.visual_valid)
                if keep is None:
                    keep = self.method.keep_counts(stage)
        counts = self._recycling(stage, keep)
        pool, merged = [p for p, _ in counts], [m for _, m in counts]
        self._log(stage, scores, order, keep, merged)
        if keep == stage.n_visual:
            return None
        uniform = self.visual_valid is None and len({*zip(keep, pool, merged, strict=True)}) == 1
        return Decision(stage.layer, order, keep, pool, merged, uniform)

    def _recycling(self, stage: Stage, keep: list[int]) -> list[tuple[int, int]]:
        if self.method.adaptive:
            share, cluster = self.method.recycle, self.method.cluster
            return [recycled_counts(n - k, share, cluster) for n, k in zip(stage.n_visual, keep, strict=True)]
        return [s.at(stage.layer, n)[1:] for s, n in zip(self.schedules, stage.n_visual, strict=True)]

    def _log(self, stage: Stage, scores, order, keep: list[int], merged: list[int]) -> None:
        whole = [n - c for n, c in zip(self.prompt.n_visual, self.prompt.counts, strict=True)]  # left alone
        now = (self.visual_index, self.source, tuple(self.merged_sources), self.prompt.visual)
        details = partial(records.stage_details, scores, order, keep, stage.n_visual, whole, *now)
        tokens_in = [n + w for n, w in zip(stage.n_visual, whole, strict=True)]
        tokens_out = [k + m + w for k, m, w in zip(keep, merged, whole, strict=True)]
        self.record.stages.append(StageRecord(stage.layer, tokens_in, tokens_out, list(merged), details))
        self.method.annotate(self.record.stages[-1], self)

    def _apply(self, d: Decision, hidden: Tensor) -> Tensor:
        """Drop, merge and reorder: from the rows of one segment to those of the next."""
        with part("recycling"):
            key, hidden = self._sort_keys(d, hidden)
        self.visual_end = None
        left = [k + m for k, m in zip(d.keep, d.merged, strict=True)]
        self.tokens = [t - n + x for t, n, x in zip(self.tokens, self.n_visual, left, strict=True)]
        length = max(self.tokens)
        if self.key_mask is not None:
            key = key.masked_fill(~self.key_mask[:, -self.length :], -1)
        order = key.sort(dim=1, stable=True).indices[:, self.length - length :]
        self.visual_flag = self.visual_flag.gather(1, order)
        if min(self.tokens) != length:
            self.visual_flag = self.visual_flag & (key.gather(1, order) >= 0)
        if self.method.positions == "original":
            self.rope = take(self.rope[0], order), take(self.rope[1], order)
        self.source = self.source.gather(1, order)
        self.visual_index = pack(self.visual_flag, max(left))
        self.visual_valid = None
        if min(left) != max(left):
            self.visual_valid = self.visual_flag.gather(1, self.visual_index)
        self._align_text()
        self.n_visual, self.length = left, length
        hidden = take(hidden, order)
        with part("masks"):
            self._begin_segment(d.layer + 1, hidden)
        return hidden

    def _sort_keys(self, d: Decision, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Sort keys [B, L]; states with merged tokens in the rows of their centres."""
        device = hidden.device
        key = torch.arange(self.length, dtype=torch.float32, device=device).repeat(self.batch, 1)
        position = self.visual_index.gather(1, d.order)  # of the visual tokens, by score
        if d.uniform:
            key.scatter_(1, position[:, d.keep[0] :], -1.0)
        else:
            dropped = torch.arange(position.shape[1], device=device) >= self._column(d.keep)
            if self.visual_valid is not None:
                dropped = dropped & (torch.arange(position.shape[1], device=device) < self._column(self.n_visual))
            key.scatter_(1, position, torch.where(dropped, -1.0, key.gather(1, position)))
        pool, width = max(d.pool), max(d.merged)
        if width == 0:
            return key, hidden
        if d.uniform:
            members, valid, real = position[:, d.keep[0] : d.keep[0] + pool], None, None
        else:
            best = torch.arange(pool, device=device)
            members = position.gather(1, (self._column(d.keep) + best) % position.shape[1])
            valid = best < self._column(d.pool)
            real = torch.arange(width, device=device) < self._column(d.merged)
        tokens = take(hidden, members)
        centres, weights = self.method.merge_tokens(tokens, self._column(d.merged)[:, 0], width, valid)
        rows = members.gather(1, centres)  # a merged token takes the row of its centre
        states = (weights @ tokens.to(weights.dtype)).to(hidden.dtype)
        if self.method.recycled_at == "end":
            last = self.visual_index[:, -1:] if self.visual_end is None else self.visual_end
            if self.visual_valid is not None:
                last = torch.where(self.visual_flag, self._index(), -1).amax(1, keepdim=True)
            step = 1 / (width + 1)
            place = last + torch.linspace(step, 1 - step, width, device=device)
        else:
            place = rows.float()
        if real is not None:  # entries beyond a sample's own write the value that is there already
            place = torch.where(real, place, key.gather(1, rows))
            states = torch.where(real[..., None], states, take(hidden, rows))
        key.scatter_(1, rows, place)
        hidden = hidden.scatter(1, rows[..., None].expand_as(states), states)
        source = self.source.gather(1, rows)
        self.merged_sources.append(source if real is None else source.masked_fill(~real, -1))
        return key, hidden

    def _align_text(self) -> None:
        """After the first gather right padding has moved to the left, and the text to the right by as much."""
        if not self.misaligned:
            return
        self.misaligned = False
        tail, self.tail = self.tail, self.prompt.aligned_tail
        index = torch.arange(tail - self.tail, tail, device=self.device) - self._column(self.prompt.trailing)
        for name in ("weights", "text_valid"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0))

    def _begin_segment(self, layer: int, hidden: Tensor) -> None:
        """From `layer` on the caches hold the current rows: masks and positions for its layers, state on the cache."""
        padding = [self.length - t for t in self.tokens]
        real = self._index() >= self._column(padding) if any(padding) else None
        cached = cached_length(self.cache, layer)
        segment = state_of(self.cache).split(layer) if self.cache is not None else None
        old, shift = (segment.key_mask, segment.shift) if cached else (None, 0)
        self.key_mask = extended(old, cached, real, self.batch, self.length, hidden.device)
        if layer == 0 and segment is not None:
            state = state_of(self.cache)
            state.dropped_at_input = (state.dropped_at_input or 0) + self.prompt.length - self.length
            report_seen_tokens(self.cache)
        if self.method.positions == "renumber":
            shift = self._renumber(padding, shift, hidden)
            self.renumbered = True
        elif self.renumbered and segment is not None:  # at an earlier stage of this call: the positions stay as there
            shift = state_of(self.cache).at(layer - 1).shift
        if segment is not None:
            segment.key_mask, segment.shift = self.key_mask, shift
        self.segment_masks = SegmentMasks(self.family, self.key_mask, self.cache, self.rope)

    def _renumber(self, padding: list[int], shift: Tensor | int, hidden: Tensor) -> Tensor | int:
        """The i-th remaining token takes the place of the i-th token, less what earlier turns are short of."""
        first = [int(row.argmax()) for row in self.prompt.real]
        gone = [int(row.sum()) - t for row, t in zip(self.prompt.real, self.tokens, strict=True)]
        if not any(padding) and not any(first):
            positions = self.call_positions[:, : self.length]
            self.rope = tuple(t[:, : self.length] for t in self.call_rope)
        else:
            offset = self._column([f - p for f, p in zip(first, padding, strict=True)])
            at = (self._index() + offset).clamp(min=0)
            positions = self.call_positions.expand(self.batch, -1).gather(1, at)
            self.rope = tuple(take(t, at) for t in self.call_rope)
        if isinstance(shift, Tensor) or shift:
            self.rope = self.family.decoder.rotary_emb(hidden, position_ids=positions - shift)
        return shift + (gone[0] if len(set(gone)) == 1 else self._column(gone))

    def _index(self) -> Tensor:
        return torch.arange(self.length, device=self.source.device)

    def _column(self, values: list[int]) -> Tensor:
        """[B, 1] int64 of per-sample host values."""
        return torch.tensor(values, device=self.device)[:, None]

    def _to(self, device: torch.device) -> None:
        """Follow the states to another device (models spread over several)."""
        self.device = device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.rope = tuple(t.to(device) for t in self.rope)
        self.call_rope = tuple(t.to(device) for t in self.call_rope)
