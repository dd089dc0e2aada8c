"""Attention rows of a few query tokens, and scores made of them. Never an L x L matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevlm.core.precision import at_least_float32


def causal_bias(rows: int, length: int, dtype: torch.dtype, device: torch.device, window: int | None = None) -> Tensor:
    """Make the causal mask [rows, length] to add to the logits of the last `rows` tokens of a sequence.

    It is 0, or the lowest value of `dtype` where a key comes later or is at least `window` tokens ago. Its last columns
    are those of a shorter sequence.
    """
    lowest = torch.finfo(dtype).min
    bias = torch.full((rows, length), lowest, dtype=dtype, device=device)
    if window is None or window >= length:
        return bias.triu_(length - rows + 1)
    return bias.triu(length - rows + 1).add_(bias.tril_(length - rows - window))


def attention_rows(
    query: Tensor, key: Tensor, scaling: float, key_mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Compute the softmaxed attention of the last T tokens of a sequence to all of its S tokens.

    Equal to the last T rows of the full causal attention (normalised over all keys, as in the model), at a cost of
    T x S instead of S x S. Logits and softmax are float32 also in half precision (float64 stays): the authors' scores
    are probabilities in the model's dtype, of which bfloat16 has fewer distinct values than there are visual tokens.

    Args:
        query: [B, H, T, d], rotated; rows of the last T tokens.
        key: [B, H_kv, S, d], rotated; grouped-query attention if H_kv < H.
        scaling: factor of the logits.
        key_mask: [B, S] bool, False = padding; None = no padding.
        bias: [T, S] or [B, 1, T, S], see `causal_bias`; None = causal without a window.

    Returns:
        [B, H, T, S]. Rows of padding tokens hold arbitrary finite values.
    """
    batch, heads, rows, width = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    dtype = at_least_float32(query.dtype)
    if bias is None:
        bias = causal_bias(rows, length, dtype, key.device)
    query = query.to(dtype).reshape(batch, kv_heads, (heads // kv_heads) * rows, width)
    logits = (query @ key.to(dtype).transpose(2, 3)).view(batch, heads, rows, length)
    logits = torch.add(bias, logits, alpha=scaling)
    if key_mask is not None:
        logits.masked_fill_(~key_mask[:, None, None], torch.finfo(dtype).min)
    return logits.softmax(-1)


def mean_scores(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum weighted rows and average over heads (authors' score.py:27-32).

    Args:
        rows: [B, H, T, N] attention.
        weights: [B, T], zero for rows that do not rate, summing to one.

    Returns:
        [B, N].
    """
    weights = weights.to(rows.dtype)[:, None, None].expand(-1, rows.shape[1], -1, -1)
    return (weights @ rows).mean(1).squeeze(1)


def shares_of_rows(rows: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average over heads, divide each row by what it pays the visual tokens together, and average over rows.

    Dividing by the sum or by the mean, a row's own prior, gives the same order.

    Args:
        rows: [B, H, T, V] attention to the visual tokens.
        weights: [B, T] weights of the rows.
        valid: [B, V] bool, which visual tokens are there; None = all. Others get 0.

    Returns:
        [B, V]; a row that pays nothing adds nothing.
    """
    rows = rows.mean(1)
    if valid is not None:
        rows = rows.masked_fill(~valid[:, None], 0)
    total = rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return (weights.to(rows.dtype)[:, None] @ (rows / total))[:, 0]


def rank_by_score(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return indices [B, N] of `scores` [B, N] from high to low; equal scores by index; invalid entries last."""
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices
