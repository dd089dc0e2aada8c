"""Rank-adaptive sparsification level (SparseVLM section 3.2, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rank(attention: Tensor, raters: Tensor, visual_valid: Tensor | None = None) -> list[int]:
    """Compute the rank of each sample's rater x visual attention, with torch's default tolerance as the authors do.

    Each sample is cut to its own raters and visual tokens first, because the tolerance depends on the matrix' shape; so
    the rank is the same alone and in a batch. In practice it equals the number of raters (or of tokens, if fewer).

    Args:
        attention: [B, T, V], mean over heads.
        raters: [B, T] bool.
        visual_valid: [B, V] bool, None = all.

    Returns:
        one int per sample. Waits for the device: an adaptive length must be known to the host.
    """
    ranks = []
    for b in range(attention.shape[0]):
        own = attention[b][raters[b]]
        own = own if visual_valid is None else own[:, visual_valid[b]]
        ranks.append(int(torch.linalg.matrix_rank(own)) if own.numel() else 0)
    return ranks
