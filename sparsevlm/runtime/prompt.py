"""The layout of a prompt, read to the host once: where visual tokens, text and padding are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Prompt:
    """Host-side facts of one forward that brings visual tokens.

    Attributes:
        length: tokens of this call, padding included.
        past: tokens of earlier calls (of layer 0's cache, plus what was dropped before it).
        visual: [B, length] bool, the tokens that may be dropped. Empty rows are left alone.
        real: [B, length] bool, False = padding.
        n_visual: visual tokens per sample, also of those that are left alone.
        tail: number of positions after the last visual token, the largest of the batch: the columns of `text`.
        text: [B, tail] bool, tokens of the prompt after its last visual token (right-aligned with the sequence).
        padded: whether anything, also in earlier turns, is padding.
        last: position of the prompt's last token, per sample.
        generated: how many of the last tokens are no part of the prompt.
    """

    length: int
    past: int
    visual: np.ndarray
    real: np.ndarray
    n_visual: list[int]
    tail: int
    text: np.ndarray
    padded: bool
    last: list[int]
    generated: int = 0

    @property
    def counts(self) -> list[int]:
        """Tokens that may be dropped, per sample."""
        return self.visual.sum(1).tolist()

    @property
    def runs(self) -> list[list[int]]:
        """Per sample the lengths of its runs of tokens that may be dropped, text (or the prompt's ends) around them."""
        edges = np.diff(np.pad(self.visual, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        return [(np.flatnonzero(row == -1) - np.flatnonzero(row == 1)).tolist() for row in edges]

    @property
    def open_ended(self) -> bool:
        """Whether a sample ends with its last image: the call may bring the prompt's beginning only."""
        return not self.text[np.array(self.n_visual) > 0].any(1).all()

    @property
    def trailing(self) -> list[int]:
        """Padding after the last real token, per sample (right-padded batches)."""
        return np.argmax(self.real[:, ::-1], axis=1).tolist()

    @property
    def aligned_tail(self) -> int:
        """`tail` once padding is on the left only."""
        last = np.where(self.visual, np.arange(self.length), -1).max(1)
        rows = last >= 0
        return int((self.length - 1 - last - np.array(self.trailing))[rows].max())

    def index(self, width: int) -> np.ndarray:
        """[B, width] int64: positions of the tokens that may be dropped, padded with other, distinct positions."""
        return np.argsort(~self.visual, axis=1, kind="stable")[:, :width]


def read_prompt(
    visual: Tensor, key_mask: Tensor | None, past: int, limit: int | None, needs_text: bool
) -> Prompt | None:
    """Read the layout with one device-to-host copy (none for a mask that is on the CPU already).

    Args:
        visual: [B, L] bool.
        key_mask: [B, cached + L] bool, None = no padding.
        past: tokens cached before this call.
        limit: number of tokens of this call that belong to the prompt, None = all. What follows (candidates of
            assisted decoding, generated tokens without a cache) neither rates nor is visual.
        needs_text: leave samples alone whose images no text follows: nothing could rate them.

    Returns:
        None if no sample has visual tokens. `visual` is empty if none of them can be rated.
    """
    batch, length = map(int, visual.shape)  # numbers also where a tracer makes tensors of sizes
    if key_mask is None or key_mask.device.type == "meta":
        host, mask = visual.cpu().numpy(), np.ones((batch, length), bool)
    elif key_mask.device == visual.device:
        both = torch.cat([visual, key_mask], 1).cpu().numpy()
        host, mask = both[:, :length], both[:, length:]
    else:
        host, mask = visual.cpu().numpy(), key_mask.cpu().numpy()
    asked = mask[:, -length:] & (np.arange(length) < (length if limit is None else int(limit)))  # real, of the prompt
    host = host & asked
    n_visual = host.sum(1).tolist()
    if not any(n_visual):
        return None
    last = np.where(host, np.arange(length), -1).max(1)
    tail = int(length - 1 - last[np.array(n_visual) > 0].min())
    text = (asked & (np.arange(length) > last[:, None]))[:, length - tail :]
    droppable = host & text.any(1)[:, None] if needs_text else host
    ends = np.where(asked, np.arange(length), 0).max(1)
    generated = 0 if limit is None else max(0, length - int(limit))
    real, padded = mask[:, -length:], not mask.all()
    return Prompt(length, past, droppable, real, n_visual, tail, text, padded, ends.tolist(), generated)
