"""Visual rows of a call, the square grids that they form, and attention within windows of these grids."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.packing import pack, take


@dataclass(frozen=True)
class Picture:
    """`side` x `side` consecutive rows of a sample, from row `start` on."""

    sample: int
    start: int
    side: int


class Grids:
    """Where the visual rows of a call are.

    Attributes:
        flag: [B, L] bool, whether a row is a visual token.
        text_rows, visual_rows: int64 indices of the rows of [B * L].
        pictures: their grids, after `find_pictures`.
    """

    def __init__(self, visual: np.ndarray, device: torch.device):
        self.host = visual
        self.flag = torch.from_numpy(np.ascontiguousarray(visual)).to(device)
        self.text_rows, self.visual_rows = (
            torch.from_numpy(np.flatnonzero(flag)).to(device) for flag in (~visual, visual)
        )
        self.pictures: list[Picture] = []
        self._windowed: tuple | None = None

    def find_pictures(self, size: int | None) -> None:
        """Divide the runs of visual rows into pictures of `size` tokens; None = each run is one picture.

        Raises:
            ValueError: a run that is no whole number of square grids.
        """
        for b, row in enumerate(self.host):
            edges = np.flatnonzero(np.diff(np.pad(row.astype(int), 1)))
            for start, end in edges.reshape(-1, 2).tolist():
                count = end - start if size is None else size
                side = isqrt(count)
                if side * side != count or (end - start) % count:
                    raise ValueError(
                        f"window needs pictures whose tokens form a square grid, not {end - start} visual tokens in a "
                        "row. Use window=None"
                    )
                self.pictures += [Picture(b, first, side) for first in range(start, end, count)]

    # ---- windows as masks ------------------------------------------------------------------------------------------
    def windowed(self, mask: Tensor | None, reach: int, causal: bool, query: Tensor, key: Tensor, past: int) -> Tensor:
        """`mask` [B, 1, L, S] of truth values or added to logits, its block of each picture replaced by the window.

        Args:
            mask: None = causal.
            past: keys before those of these rows.
        """
        if self._windowed is not None and self._windowed[0] is mask:  # the same in every layer
            return self._windowed[1].to(query.device)
        same, near = (x.to(query.device)[:, None] for x in self._near(reach, causal))
        length = query.shape[2]
        if mask is None:
            made = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(past)[None, None]
        else:
            made = mask
        made = made.expand(len(self.host), -1, -1, -1).clone()
        if made.dtype != torch.bool:
            near = torch.zeros(near.shape, dtype=made.dtype, device=near.device).masked_fill(
                ~near, torch.finfo(made.dtype).min
            )
        made[..., past : past + length] = torch.where(same, near, made[..., past : past + length])
        self._windowed = mask, made
        return made

    def _near(self, reach: int, causal: bool) -> tuple[Tensor, Tensor]:
        """[B, L, L] bool: whether two rows are of one picture, and within reach of one another there."""
        place = np.full((3, *self.host.shape), -1)
        for number, p in enumerate(self.pictures):
            inside = np.arange(p.side**2)
            places = np.full_like(inside, number), *np.divmod(inside, p.side)
            place[:, p.sample, p.start : p.start + p.side**2] = places
        number, row, column = torch.from_numpy(place).to(self.flag.device)
        same = (number[:, :, None] == number[:, None]) & self.flag[:, :, None]
        near = same
        for x in (row, column):
            near = near & ((x[:, :, None] - x[:, None]).abs() <= reach)
        return same, near.tril() if causal else near

    # ---- rows of text ----------------------------------------------------------------------------------------------
    def text(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[B, T] int64 rows that are no visual tokens, and [B, T] bool which of these entries are real."""
        index = pack(~self.flag, int((~self.host).sum(1).max())).to(device)
        return index, ~self.flag.to(device).gather(1, index)


def attend(grids: Grids, query: Tensor, key: Tensor, value: Tensor, mask, text_only: bool, **options) -> Tensor:
    """[B, H, L, d]: attention of the rows of text, to text alone or to all keys; zero in the other rows.

    Args:
        query, key, value: [B, H, L, d] of one call without earlier keys.
        mask: [B, 1, L, L] bool, or None = causal.
    """
    index, real = grids.text(query.device)
    rows = index[:, None, :, None]
    q = query.gather(2, rows.expand(-1, query.shape[1], -1, query.shape[3]))
    allowed = _rows(mask, index, query.shape[2])
    if text_only:
        key, value = (x.gather(2, rows.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
        allowed = allowed.gather(3, index[:, None, None].expand(-1, -1, index.shape[1], -1)) & real[:, None, None]
        allowed = allowed | torch.eye(
            index.shape[1], dtype=torch.bool, device=query.device
        )  # entries that are not real
    made = F.scaled_dot_product_attention(q, key, value, attn_mask=allowed, **_options(options))
    made = made.masked_fill(~real[:, None, :, None], 0)
    return torch.zeros_like(query).scatter(2, rows.expand_as(made), made)


def attend_in_bands(grids: Grids, reach: int, causal: bool, query, key, value, mask, **options) -> Tensor:
    """[B, H, L, d]: rows of text see what `mask` says; visual ones their window, and what comes before their picture.

    A row of the grid is computed with the 2 * reach + 1 rows around it: N * (2 * reach + 1) * side scores of a picture
    of N = side * side tokens, of which a mask hides the columns out of reach.
    """
    out = attend(grids, query, key, value, mask, text_only=False, **options)
    groups: dict[tuple[int, int], list[int]] = {}
    for p in grids.pictures:
        groups.setdefault((p.start, p.side), []).append(p.sample)
    for (start, side), samples in groups.items():
        of = torch.tensor(samples, device=query.device)
        before = None if mask is None else mask[of.clamp(max=mask.shape[0] - 1), 0, start, :start]
        q, k, v = (x.index_select(0, of)[:, :, : start + side * side] for x in (query, key, value))
        made = _band(q[:, :, start:], k, v, before, side, reach, causal, _options(options))
        rows = torch.arange(start, start + side * side, device=query.device)
        out = out.index_copy(0, of, out.index_select(0, of).index_copy(2, rows, made))
    return out


def _band(query, key, value, before, side: int, reach: int, causal: bool, options: dict) -> Tensor:
    """[m, H, N, d] for the queries [m, H, N, d] of m pictures, whose keys are the last N of [m, H, start + N, d]."""
    m, heads = query.shape[:2]
    start = key.shape[2] - side * side
    band = 2 * reach + 1

    def rows(x: Tensor) -> Tensor:
        """[m * side, H, start + band * side, d]: what each row of the grid is computed with."""
        grid = F.pad(x[:, :, start:].unflatten(2, (side, side)), (0, 0, 0, 0, reach, reach))
        near = grid.unfold(2, band, 1).permute(0, 2, 1, 5, 3, 4).reshape(m, side, heads, band * side, -1)
        first = x[:, None, :, :start].expand(-1, side, -1, -1, -1)
        return torch.cat([first, near], 3).flatten(0, 1)

    step, line = torch.arange(band, device=query.device), torch.arange(side, device=query.device)
    other = line[:, None] + step - reach  # [side, band]: row of the grid
    inside = ((other >= 0) & (other < side))[:, None, :, None]
    seen = inside & ((line[:, None] - line).abs() <= reach)[None, :, None]  # [row, column, band, column]
    if causal:
        place = other[:, None, :, None] * side + line
        seen = seen & (place <= (line[:, None] * side + line)[:, :, None, None])
    seen = seen.flatten(2).expand(m, -1, -1, -1)
    earlier = seen.new_ones(m, start) if before is None else before
    seen = torch.cat([earlier[:, None, None].expand(-1, side, side, -1), seen], 3).flatten(0, 1)[:, None]
    q = query.unflatten(2, (side, side)).transpose(1, 2).flatten(0, 1)
    made = F.scaled_dot_product_attention(q, rows(key), rows(value), attn_mask=seen, **options)
    return made.unflatten(0, (m, side)).transpose(1, 2).flatten(2, 3)


def _rows(mask: Tensor | None, index: Tensor, length: int) -> Tensor:
    """[B, 1, T, L] bool: rows `index` [B, T] of a mask [B, 1, L, L]; None = causal."""
    if mask is None:
        return (index[..., None] >= torch.arange(length, device=index.device))[:, None]
    return take(mask[:, 0], index)[:, None]


def _options(options: dict) -> dict:
    return {"scale": options["scaling"], "dropout_p": options.get("dropout", 0.0)}
