"""ATP-LLaVA's scores and masks, after a third party's reading (Sneha421/AI6103-ATP-LLaVA c9a622f, atp_module.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEMPERATURE = 10.0
SPATIAL_WEIGHT = 3.0  # lambda_sample
LAYER_WEIGHT, TARGET_WEIGHT = 0.05, 0.2


class Thresholds(nn.Module):
    """Predicts both thresholds of a stage from two numbers, the level of self- and of cross-importance.

    Args:
        width: of the layer between (the port: that of the language model).
    """

    def __init__(self, width: int):
        super().__init__()
        self.score_projection = nn.Linear(2, width)
        self.redundant_threshold_head = nn.Linear(width, 1)
        self.spatial_threshold_head = nn.Linear(width, 1)

    def forward(self, level_self: Tensor, level_cross: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, 1] of the redundancy and the spatial threshold, of levels [B]."""
        z = self.score_projection(torch.stack([level_self, level_cross], -1))
        return self.redundant_threshold_head(z), self.spatial_threshold_head(z)


def received(attention: Tensor, rows: Tensor) -> Tensor:
    """Average over heads and rows the attention that tokens get.

    Args:
        attention: [B, H, T, V].
        rows: [B, T] weights of the rows; rows of weight 0 do not count.

    Returns:
        [B, V]; zeros where no row counts.
    """
    weights = rows.to(attention.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
    return (weights[:, None] @ attention.mean(1))[:, 0]


def relative(scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Divide scores [B, V] by their mean over the tokens, weighted by [B, V]; also return their sum [B].

    Of received attention the sum is the share that goes to these tokens; the port's means are 1/V of it and carry
    nothing else, but thresholds between 0 and 1 cannot tell scores of 1/V from nothing.
    """
    weights = weights.to(scores.dtype)
    total = (scores * weights).sum(1)
    mean = total / weights.sum(1).clamp(min=1e-9)
    return scores / mean.clamp(min=1e-12)[:, None], total


def stride_of(sampling: float) -> int:
    """Return the step in rows and in columns of a uniform sample of so large a share of the tokens."""
    step: float = sampling**-0.5
    return max(1, round(step))


def spatial_scores(sampled: Tensor, sampling: float) -> Tensor:
    """Return max(0, 1 - 3 sampling) where a token is in the uniform sample, 0 elsewhere; float32 of a bool tensor."""
    return sampled.float() * max(0.0, 1.0 - SPATIAL_WEIGHT * sampling)


def excess(redundant: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor) -> Tensor:
    """Return how far a token [B, V] is above the nearer of its thresholds [B, 1]; above 0 it stays."""
    return torch.maximum(redundant - theta_r, spatial - theta_s)


def soft_mask(above: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the mask of the training: sigmoid(temperature * excess), the larger of both masks as sigmoid rises."""
    return (temperature * above).sigmoid()


def layer_penalty(kept: list[Tensor], layers: tuple[int, ...], n_visual: int) -> Tensor:
    """Compute the mean over samples of sum_l l * kept_l / n_visual, of tokens kept [B] after each stage."""
    total = sum((layer * k for layer, k in zip(layers, kept, strict=True)), kept[0].new_zeros(()))
    return total.mean() / n_visual


def target_loss(kept: list[Tensor], target: float) -> Tensor:
    """Compute |mean over stages and samples of the tokens kept - target|, of tokens kept [B] after each stage."""
    return (torch.stack(kept).mean() - target).abs()
