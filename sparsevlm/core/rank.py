"""Rank-adaptive sparsification level (SparseVLM section 3.2, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rank(attention: Tensor, raters: Tensor, visual_valid: Tensor | None = None) -> list[int]:
    """Rank of each sample's rater x visual attention P, with torch's default tolerance, as the authors' code takes it.

    Every sample is cut to its own raters and visual tokens first, because the tolerance depends on the matrix' shape:
    the rank in a batch is then the rank alone. In practice it equals the number of raters (or of tokens, if fewer).

    Args:
        attention: [B, T, V], mean over heads.
        raters: [B, T] bool.
        visual_valid: [B, V] bool, None = all.

    Returns:
        one int per sample (a host synchronisation, as an adaptive length must be known to the host).
    """
    ranks = []
    for b in range(attention.shape[0]):
        p = attention[b][raters[b]]
        p = p if visual_valid is None else p[:, visual_valid[b]]
        ranks.append(int(torch.linalg.matrix_rank(p)) if p.numel() else 0)
    return ranks
