"""The RoPE kernel that SparseVLM+ divides attention by ("gravity", authors' modelling_sparse_llama.py:242-251)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated_ones(cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to ones: tables [..., d] -> [..., d] float32. Half-split layout (Llama, Qwen, Mistral)."""
    half = cos.shape[-1] // 2
    sign = torch.ones(cos.shape[-1], device=cos.device)
    sign[:half] = -1
    return cos.float() + sign * sin.float()


def rope_kernel(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Compute G[m, n] = (2 / sqrt(d)) sum_i cos((p_m - p_n) theta_i) from the cos and sin tables of positions p.

    Args:
        query: cos, sin [B, T, d] of the query tokens.
        key: cos, sin [B, N, d] of the keys.

    Returns:
        [B, T, N] float32.
    """
    rotated_query, rotated_key = rotated_ones(*query), rotated_ones(*key)
    kernel: Tensor = rotated_query @ rotated_key.transpose(1, 2) / rotated_query.shape[-1] ** 0.5
    return kernel


def first_nonpositive_distance(inv_freq: Tensor, limit: int) -> int | None:
    """Return the smallest distance below `limit` at which the kernel is not positive; None if there is none.

    Beyond it dividing by the kernel flips the sign of a score. Example: 1707 for head size 128 and theta 1e4.
    `inv_freq` [d / 2] must be on the CPU (no device is synchronised).
    """
    angle = torch.arange(limit, dtype=torch.float64)[:, None] * inv_freq.double()
    kernel = angle.cos().sum(1)
    bad = (kernel <= 0).nonzero()
    return int(bad[0]) if len(bad) else None
