"""Choosing tokens that differ from each other: max-min distance, determinantal point processes, duplicate removal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_matrix(x: Tensor) -> Tensor:
    """Return the cosine similarities [n, t, t] of tokens [n, t, d], in at least float32."""
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    return unit @ unit.transpose(1, 2)


def max_min(distance: Tensor, count: int) -> Tensor:
    """Choose tokens by greedy max-min diversity (DivPrune, arXiv 2503.02175, algorithm 1).

    The first token is the one whose nearest neighbour is farthest; then always the one farthest from those chosen.
    Ties go to the lower index.

    Args:
        distance: [n, t, t] float.
        count: tokens to choose, 1 ... t.

    Returns:
        [n, count] int64 in order of choice.
    """
    t = distance.shape[1]
    own = torch.eye(t, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(own, float("inf")).amin(1)
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    chosen = []
    for step in range(count):
        pick = nearest.masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        chosen.append(pick)
        taken = taken | (torch.arange(t, device=pick.device) == pick)
        row = distance.gather(1, pick[..., None].expand(-1, -1, t))[:, 0]
        nearest = row if step == 0 else nearest.minimum(row)
    return torch.cat(chosen, 1)


def dpp_greedy(kernel: Tensor, count: int) -> Tensor:
    """Choose tokens by greedy MAP inference of a determinantal point process (arXiv 1709.05135, algorithm 1).

    Args:
        kernel: [n, t, t], symmetric positive semi-definite.
        count: tokens to choose, 1 ... t.

    Returns:
        [n, count] int64 in order of choice.
    """
    n, t = kernel.shape[:2]
    gain = kernel.diagonal(dim1=1, dim2=2)
    floor = torch.finfo(kernel.dtype).tiny
    taken = torch.zeros_like(gain, dtype=torch.bool)
    factor = kernel.new_zeros(n, 0, t)
    chosen = []
    for _ in range(count):
        pick = gain.masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        chosen.append(pick)
        taken = taken | (torch.arange(t, device=pick.device) == pick)
        row = kernel.gather(1, pick[..., None].expand(-1, -1, t))
        column = factor.gather(2, pick[:, None].expand(-1, factor.shape[1], -1))
        row = (row - column.transpose(1, 2) @ factor) / gain.gather(1, pick).clamp(min=floor).sqrt()[..., None]
        factor = torch.cat([factor, row], 1)
        gain = gain - row[:, 0].square()
    return torch.cat(chosen, 1)


def remove_duplicates(similarity: Tensor, order: Tensor, count: int, step: int = 8) -> Tensor:
    """Remove tokens that resemble others until `count` are left (VisPruner, arXiv 2412.01818, section 3.3).

    Each round deals the tokens alternately into A and B and drops the `step` tokens of A that are most similar to any
    of B. Survivors of A follow in order of falling similarity, then B.

    Args:
        similarity: [n, t, t] float.
        order: [n, m] int64, the candidates, in the order in which they are dealt.
        count: tokens to leave, 0 ... m.
        step: tokens dropped per round.

    Returns:
        [n, count] int64.
    """
    if count == 0:
        return order[:, :0]
    while order.shape[1] > count:
        a, b = order[:, ::2], order[:, 1::2]
        drop = min(step, order.shape[1] - count, a.shape[1])
        rows = similarity.gather(1, a[..., None].expand(-1, -1, similarity.shape[2]))
        best = rows.gather(2, b[:, None].expand(-1, a.shape[1], -1)).amax(2)
        stay = best.argsort(dim=1, descending=True, stable=True)[:, drop:]
        order = torch.cat([a.gather(1, stay), b], 1)
    return order
