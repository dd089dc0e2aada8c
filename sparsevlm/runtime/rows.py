"""Where visual tokens are among the rows of a prefill, and how dropping and merging moves rows.

Two forms with one interface: `Block`, the same consecutive rows in all samples, which slices; `Scattered`, any rows,
which gathers. Pruning acts in two steps: `select` says which rows survive (kept tokens, recycling candidates, text),
`merge` turns the candidates into merged tokens. With early drop a layer lies between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sparsevlm.core.packing import pack, take
from sparsevlm.runtime.decision import Decision
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.prompt import Prompt


@dataclass
class Merged:
    """Rows after a stage.

    Attributes:
        hidden: [B, L', D] states.
        rows: where the visual tokens are now.
        source: [B, L'] int64, as given, of the rows that are left; of a merged token that of its centre.
        merged: [B, n] int64, that of merged tokens, -1 = none; None = nothing was merged.
        follow: makes [B, L'] int64, the row that each was before; None = no row has moved.
    """

    hidden: Tensor
    rows: Block | Scattered
    source: Tensor
    merged: Tensor | None
    follow: Callable[[], Tensor] | None


@dataclass
class Block:
    """Visual tokens that are the same consecutive rows of all samples; no sample has padding.

    Attributes:
        batch, length: samples, current rows.
        start, count: first of the visual rows, and how many.
        numbers: [at least L] int64, 0, 1, ...
        places: [B, count] int64, after `select`: the rows they were before. Kept ones ascend, candidates come by score.
    """

    batch: int
    length: int
    start: int
    count: int
    numbers: Tensor
    places: Tensor | None = None

    valid = None  # all of `index`

    @property
    def n_visual(self) -> list[int]:
        return [self.count] * self.batch

    @cached_property
    def index(self) -> Tensor:
        """[B, V] int64: rows of the visual tokens."""
        return self._rows(self.start, self.start + self.count)

    @cached_property
    def flag(self) -> Tensor:
        """[B, L] bool: whether a row is a visual token."""
        numbers = self._rows(0, self.length)
        return (numbers >= self.start) & (numbers < self.start + self.count)

    def visual(self, x: Tensor) -> Tensor:
        """Visual rows [B, V, ...] of [B, L, ...]."""
        return x[:, self.start : self.start + self.count]

    def columns(self, x: Tensor) -> Tensor:
        """Visual columns [B, ..., V] of [B, ..., S], whose last L columns are the rows."""
        first = x.shape[-1] - self.length + self.start
        return x[..., first : first + self.count]

    def to(self, device: torch.device) -> Block:
        places = None if self.places is None else self.places.to(device)
        return replace(self, numbers=self.numbers.to(device), places=places)

    def scattered(self) -> Scattered:
        return Scattered(self.batch, self.length, self.n_visual, self.index, self.flag)

    def select(self, d: Decision) -> tuple[Tensor, Block, Decision]:
        """Rows [B, N] that survive, where their visual tokens are, and the decision in terms of these."""
        stay = d.keep[0] + d.pool[0]
        best = d.order[:, :stay] + self.start
        kept = best[:, : d.keep[0]].sort(dim=1).values
        after = self.start + self.count
        survivors = [self._rows(0, self.start), kept, best[:, d.keep[0] :], self._rows(after, self.length)]
        length = self.length - self.count + stay
        index = torch.cat(survivors, 1)
        places = index[:, self.start : self.start + stay]
        rows = Block(self.batch, length, self.start, stay, self.numbers, places)
        return index, rows, replace(d, order=None)

    def merge(
        self, d: Decision, hidden: Tensor, source: Tensor, method, tokens: list[int], real: Tensor | None
    ) -> Merged:
        """Turn the candidates into merged tokens; `select` came before. Arguments as for `Scattered.merge`."""
        keep, pool, width = d.keep[0], d.pool[0], d.merged[0]
        first, after = self.start + keep, self.start + keep + pool
        rows = Block(self.batch, self.length - pool + width, self.start, keep + width, self.numbers)
        if width == 0:
            return Merged(hidden, rows, source, None, None)
        with part("recycling"):
            members = hidden[:, first:after]
            centres, weights = method.merge_tokens(members, None, width, None)
            states = (weights @ members.to(weights.dtype)).to(hidden.dtype)
        merged = source[:, first:after].gather(1, centres)
        hidden = torch.cat([hidden[:, :first], states, hidden[:, after:]], 1)
        source = torch.cat([source[:, :first], merged, source[:, after:]], 1)

        def follow() -> Tensor:
            return torch.cat([self._rows(0, first), centres + first, self._rows(after, self.length)], 1)

        if method.recycled_at == "end":
            return Merged(hidden, rows, source, merged, follow)
        places = torch.cat([self.places[:, :keep], self.places[:, keep:].gather(1, centres)], 1)
        inner = places.argsort(1) + self.start
        order = torch.cat([self._rows(0, self.start), inner, self._rows(first + width, rows.length)], 1)
        return Merged(take(hidden, order), rows, source.gather(1, order), merged, lambda: follow().gather(1, order))

    def _rows(self, first: int, after: int) -> Tensor:
        return self.numbers[first:after].expand(self.batch, -1)


@dataclass
class Scattered:
    """Visual tokens at any rows, of samples that may differ in their number; padding may lie on the left or right.

    Each token gets a sort key: its row, -1 if it is dropped, and a place among the others if it is a merged one.
    Sorting the keys drops, orders and left-pads in one go; states and positions follow by gathers.

    Attributes:
        batch, length: samples, current rows.
        n_visual: visual tokens per sample (0: the sample is left alone).
        index: [B, V] int64, rows of the visual tokens, V = the largest number.
        flag: [B, L] bool, whether a row is a visual token.
        valid: [B, V] bool, which entries of `index` are real; None = all.
        end: [B, 1] the row that merged tokens follow, where that is not the last visual one (early drop).
    """

    batch: int
    length: int
    n_visual: list[int]
    index: Tensor
    flag: Tensor
    valid: Tensor | None = None
    end: Tensor | None = None

    def visual(self, x: Tensor) -> Tensor:
        """Visual rows [B, V, ...] of [B, L, ...]."""
        return take(x, self.index)

    def columns(self, x: Tensor) -> Tensor:
        """Visual columns [B, ..., V] of [B, ..., S], whose last L columns are the rows."""
        index = self.index + (x.shape[-1] - self.length)
        return x.gather(-1, index.view(self.batch, *[1] * (x.dim() - 2), -1).expand(*x.shape[:-1], -1))

    def to(self, device: torch.device) -> Scattered:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def select(self, d: Decision) -> tuple[Tensor, Scattered, Decision]:
        """Rows [B, N] that survive, in order; the same number in all samples."""
        stay = d.keep[0] + d.pool[0]
        flag = torch.zeros(self.batch, self.length, dtype=torch.uint8, device=self.index.device)
        flag.scatter_(1, self.index.gather(1, d.order[:, stay:]), 1)
        length = self.length - self.index.shape[1] + stay
        alive = flag.sort(dim=1, stable=True).indices[:, :length]
        visual = self.flag.gather(1, alive)
        # merged tokens go where the last visual token was, though it be dropped
        end = (alive <= self.index[:, -1:]).sum(1, keepdim=True) - 1
        rows = Scattered(self.batch, length, [stay] * self.batch, pack(visual, stay), visual, None, end)
        order = d.order[:, :stay].argsort(1).argsort(1)  # old places among the visual tokens to new ones
        return alive, rows, replace(d, order=order)

    def merge(
        self, d: Decision, hidden: Tensor, source: Tensor | None, method, tokens: list[int], real: Tensor | None
    ) -> Merged:
        """Drop, merge and reorder.

        Args:
            hidden: [B, L, D].
            source: [B, L] int64, what is known of each row; None = its number.
            method: merges, and says where merged tokens go.
            tokens: rows per sample that are left, padding excluded.
            real: [B, L] bool, False = padding; None = all.
        """
        key, hidden, centres, exist = self._sort_keys(d, hidden, method)
        if real is not None:
            key = key.masked_fill(~real, -1)
        length, left = max(tokens), [k + m for k, m in zip(d.keep, d.merged, strict=True)]
        order = key.sort(dim=1, stable=True).indices[:, self.length - length :]
        flag = self.flag.gather(1, order)
        if min(tokens) != length:
            flag = flag & (key.gather(1, order) >= 0)
        index = pack(flag, max(left))
        valid = flag.gather(1, index) if min(left) != max(left) else None
        rows = Scattered(self.batch, length, left, index, flag, valid)
        merged = centres
        if centres is not None:
            merged = centres if source is None else source.gather(1, centres)
            merged = merged if exist is None else merged.masked_fill(~exist, -1)
        source = order if source is None else source.gather(1, order)
        return Merged(take(hidden, order), rows, source, merged, lambda: order)

    def _sort_keys(self, d: Decision, hidden: Tensor, method) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Sort keys [B, L]; states with merged tokens in the rows of their centres; these rows, and which are real."""
        device = hidden.device
        key = torch.arange(self.length, dtype=torch.float32, device=device).repeat(self.batch, 1)
        position = self.index.gather(1, d.order)  # of the visual tokens, by score
        if d.uniform:
            key.scatter_(1, position[:, d.keep[0] :], -1.0)
        else:
            dropped = torch.arange(position.shape[1], device=device) >= column(d.keep, device)
            if self.valid is not None:
                dropped = dropped & (torch.arange(position.shape[1], device=device) < column(self.n_visual, device))
            key.scatter_(1, position, torch.where(dropped, -1.0, key.gather(1, position)))
        if max(d.merged) == 0:
            return key, hidden, None, None
        with part("recycling"):
            return self._merge_into(d, key, position, hidden, method)

    def _merge_into(self, d: Decision, key: Tensor, position: Tensor, hidden: Tensor, method):
        device, pool, width = hidden.device, max(d.pool), max(d.merged)
        if d.uniform:
            members, valid, real = position[:, d.keep[0] : d.keep[0] + pool], None, None
        else:
            best = torch.arange(pool, device=device)
            members = position.gather(1, (column(d.keep, device) + best) % position.shape[1])
            valid = best < column(d.pool, device)
            real = torch.arange(width, device=device) < column(d.merged, device)
        tokens = take(hidden, members)
        centres, weights = method.merge_tokens(tokens, column(d.merged, device)[:, 0], width, valid)
        rows = members.gather(1, centres)  # a merged token takes the row of its centre
        states = (weights @ tokens.to(weights.dtype)).to(hidden.dtype)
        if method.recycled_at == "end":
            last = self.index[:, -1:] if self.end is None else self.end
            if self.valid is not None:
                last = torch.where(self.flag, torch.arange(self.length, device=device), -1).amax(1, keepdim=True)
            step = 1 / (width + 1)
            place = last + torch.linspace(step, 1 - step, width, device=device)
        else:
            place = rows.float()
        if real is not None:  # entries beyond a sample's own write the value that is there already
            place = torch.where(real, place, key.gather(1, rows))
            states = torch.where(real[..., None], states, take(hidden, rows))
        key.scatter_(1, rows, place)
        hidden = hidden.scatter(1, rows[..., None].expand_as(states), states)
        return key, hidden, rows, real


class HasRows:
    """What methods are told of `rows`, at a stage and in a prefill.

    Attributes:
        rows: where the visual tokens are now.
    """

    rows: Block | Scattered

    @property
    def n_visual(self) -> list[int]:
        """Visual tokens per sample (0: the sample is left alone)."""
        return self.rows.n_visual

    @property
    def visual_index(self) -> Tensor:
        """[B, V] int64, rows of the visual tokens, V = the largest number of a sample."""
        return self.rows.index

    @property
    def visual_valid(self) -> Tensor | None:
        """[B, V] bool, which entries of `visual_index` are real; None = all."""
        return self.rows.valid


def column(values: list[int], device: torch.device) -> Tensor:
    """[B, 1] int64 of per-sample host values."""
    return torch.tensor(values, device=device)[:, None]


def first_rows(prompt: Prompt, numbers: Tensor) -> Block | Scattered:
    """Where the tokens of a prompt that may be dropped are; `numbers` [L] is 0, 1, ... on the device."""
    visual, (batch, length) = prompt.visual, prompt.visual.shape
    start, count = int(visual[0].argmax()), int(visual[0].sum())
    if (visual == visual[0]).all() and visual[0, start : start + count].all() and prompt.real.all():
        return Block(batch, length, start, count, numbers)
    width = max(prompt.counts)
    index, flag = (torch.from_numpy(np.ascontiguousarray(x)).to(numbers.device) for x in (prompt.index(width), visual))
    valid = None
    if min(prompt.counts) != width:
        valid = numbers[:width] < column(prompt.counts, numbers.device)
    return Scattered(batch, length, prompt.counts, index, flag, valid)
