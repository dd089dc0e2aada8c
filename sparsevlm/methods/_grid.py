"""Uniform samples of the visual tokens of a prompt, picture by picture."""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from sparsevlm.runtime.prefill import Prefill


def uniform_sample(prefill: Prefill, stride: int) -> Tensor:
    """Return which tokens of the call [B, L] are in the uniform sample of their pictures, every `stride`-th both ways.

    Pictures have as many tokens as the model's config says, frames of a video one more, which comes first and is in
    the sample; visual tokens of a plain text model are one picture per run. Tokens that are no square grid are a line.
    """
    visual = prefill.prompt.visual
    size = getattr(prefill.family.outer.config, "image_seq_length", None)
    out = np.zeros(visual.shape, bool)
    for row, flags in zip(out, visual, strict=True):
        places = np.flatnonzero(flags)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            row[run] = _of_run(len(run), size, stride)
    return torch.from_numpy(out)


def _of_run(count: int, size: int | None, stride: int) -> np.ndarray:
    """Return the sample [count] bool of consecutive visual tokens."""
    fits = [n for n in (size, size + 1) if count % n == 0] if size else []
    size = fits[0] if fits else max(count, 1)
    return np.tile(grid_sample(size, stride), count // size)


def grid_sample(size: int, stride: int) -> np.ndarray:
    """Return the sample [size] bool of a picture: of its square grid, row by row; else of a line."""
    index = np.arange(size)
    for first in (0, 1):
        side = isqrt(size - first)
        if side * side == size - first:
            row, column = np.divmod(index[first:] - first, max(side, 1))
            return np.concatenate([np.ones(first, bool), (row % stride == 0) & (column % stride == 0)])
    return index % stride**2 == 0
