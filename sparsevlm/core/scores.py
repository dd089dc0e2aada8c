"""Attention rows of a few query tokens, and scores made of them. Never an L x L matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(
    query: Tensor, key: Tensor, scaling: float, key_mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Softmaxed attention of the last T tokens of a sequence to all of its S tokens.

    Equal to the last T rows of the full causal attention (normalised over all keys, as in the model), at a cost of
    T x S instead of S x S. Logits and softmax are float32 also in half precision (float64 stays): the authors' scores
    are probabilities in the model's dtype, of which bfloat16 has fewer distinct values than there are visual tokens.

    Args:
        query: [B, H, T, d], rotated; rows of the last T tokens.
        key: [B, H_kv, S, d], rotated; grouped-query attention if H_kv < H.
        scaling: factor of the logits.
        key_mask: [B, S] bool, False = padding; None = no padding.
        window: sliding window of the layer in tokens, None = full attention.

    Returns:
        [B, H, T, S]. Rows of padding tokens hold arbitrary finite values.
    """
    batch, heads, rows, width = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype).reshape(batch, kv_heads, (heads // kv_heads) * rows, width)
    logits = (query @ key.to(dtype).transpose(2, 3)).mul_(scaling).view(batch, heads, rows, length)
    lowest = torch.finfo(dtype).min
    future = torch.ones(rows, rows, dtype=torch.bool, device=key.device).triu_(1)
    logits[..., length - rows :].masked_fill_(future, lowest)
    if key_mask is not None:
        logits.masked_fill_(~key_mask[:, None, None], lowest)
    if window is not None and length > window:
        distance = torch.arange(length - rows, length, device=key.device)[:, None] - torch.arange(
            length, device=key.device
        )
        logits.masked_fill_(distance >= window, lowest)
    return logits.softmax(-1)


def mean_scores(rows: Tensor, weights: Tensor) -> Tensor:
    """Mean over heads, then weighted sum over rows (authors' score.py:27-32).

    Args:
        rows: [B, H, T, N] attention.
        weights: [B, T], zero for rows that do not rate, summing to one.

    Returns:
        [B, N].
    """
    return (weights.to(rows.dtype).unsqueeze(1) @ rows.mean(1)).squeeze(1)


def rank_by_score(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Indices [B, N] of `scores` [B, N] from high to low; equal scores in order of index; invalid entries last."""
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices
