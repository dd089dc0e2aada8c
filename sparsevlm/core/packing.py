"""Gathering and packing rows of batches whose samples differ in length."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor, width: int) -> Tensor:
    """Return the indices of the True entries of each row, ascending, padded to `width` with those of False entries.

    All indices of a row are distinct, so a scatter at padded entries never hits a real one.

    Args:
        mask: [B, L] bool.
        width: number of columns to return; at least the largest number of True entries in a row.

    Returns:
        [B, width] int64.
    """
    return mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of `x` [B, L, ...] at `index` [B, N] -> [B, N, ...]; a batch dimension of 1 in `x` is broadcast."""
    if x.shape[0] != index.shape[0]:
        x = x.expand(index.shape[0], *x.shape[1:])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))
