"""Where the rows that are left of a prompt stand: their positions, sliding windows, and the caller's own rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.core.packing import take
from sparsevlm.runtime.cache_state import Segment, cached_length, state_of
from sparsevlm.runtime.rows import column

if TYPE_CHECKING:
    from sparsevlm.runtime.prefill import Prefill


def take_rope(p: Prefill, index: Tensor, length: int) -> None:
    """Let rows `index` [B, N] of `length` keep their rotation, and their distances under a sliding window.

    Where the method says so, they take those of other rows.
    """
    index = p.method.stand_at(p, index)
    if p.family.sliding:
        places = (p.numbers[:length] - length).expand(p.batch, -1) if p.places is None else p.places
        p.places = places.gather(1, index)
    p.tables = take(p.call_tables if p.tables is None else p.tables, index)


def renumber(p: Prefill, padding: list[int], shift: Tensor | int, hidden: Tensor) -> Tensor | int:
    """The i-th remaining token takes the place of the i-th token, less what earlier turns are short of."""
    first = [int(row.argmax()) for row in p.prompt.real]
    gone = [int(row.sum()) - t for row, t in zip(p.prompt.real, p.tokens, strict=True)]
    if not any(padding) and not any(first):
        positions = p.call_positions[:, : p.length]
        p.tables = p.call_tables[:, : p.length]
    else:
        offset = column([f - pad for f, pad in zip(first, padding, strict=True)], p.device)
        at = (p.numbers[: p.length] + offset).clamp(min=0)
        positions = p.call_positions.expand(p.batch, -1).gather(1, at)
        p.tables = take(p.call_tables, at)
    if isinstance(shift, Tensor) or shift:
        p.tables = torch.cat(p.family.decoder.rotary_emb(hidden, position_ids=positions - shift), -1)
    return shift + (gone[0] if len(set(gone)) == 1 else column(gone, p.device))


def key_places(p: Prefill, cached: int, before: Segment) -> Tensor | None:
    """`Segment.places` [B, cached + L] of keys cached in earlier turns and of the current rows.

    Args:
        cached: tokens of earlier turns.
        before: the segment as these turns left it.
    """
    old = before.places
    if not p.family.sliding or (p.places is None and old is None):
        return None
    rows = p.numbers[: p.length] - p.length if p.places is None else p.places
    new = (rows + (p.prompt.past + p.prompt.length - p.shift)).expand(p.batch, -1)
    if not cached:
        return new
    if old is None:
        index = torch.arange(-cached, 0, device=p.device)
        old = (index + (p.prompt.past - before.shift)).expand(p.batch, -1)
    return torch.cat([old[:, :cached].to(p.device), new], 1)


def window_bias(p: Prefill, layer: int, tail: int, held: int, dtype: torch.dtype) -> Tensor:
    """`bias` of the last `tail` rows for the `held` keys of earlier turns and the current ones in `layer`.

    [tail, held + L], or [B, 1, tail, held + L] where a sliding window counts in places of its own.
    """
    window = p.family.window(layer)
    bias = p.bias(tail, held + p.length, dtype, window)
    if window is None:
        return bias
    cached = cached_length(p.cache, layer)  # more than a sliding cache holds
    segment = state_of(p.cache).at(layer) if cached else Segment()
    places = key_places(p, cached, segment)
    if places is None:
        return bias
    far = places[:, -tail:, None] - places[:, None, cached - held :] >= window
    return bias.expand(p.batch, 1, -1, -1).masked_fill(far[:, None], torch.finfo(dtype).min)


def restored(p: Prefill, hidden: Tensor) -> Tensor:
    """The text model's output [B, L, D] at the length of the call's input; zeros where tokens were dropped.

    Of a prompt that ends with an image whose last token was dropped, the last survivor stands in the last place, too:
    that is where the next token is read.
    """
    real = None
    if p.key_mask is not None:
        real = p.key_mask[:, -p.length :]
        hidden = hidden * real[..., None]
    full = hidden.new_zeros(hidden.shape[0], p.prompt.length, hidden.shape[2])
    source = p.source.to(hidden.device)
    full = full.scatter_add_(1, source[..., None].expand_as(hidden), hidden)
    if p.prompt.text.any(1).all():
        return full
    end = column(p.prompt.last, hidden.device)
    before = source <= end if real is None else (source <= end) & real.to(end.device)
    row = torch.where(before, torch.arange(source.shape[1], device=end.device), 0).amax(1, keepdim=True)
    return full.scatter_(1, end[..., None].expand(-1, -1, hidden.shape[2]), take(hidden, row))
