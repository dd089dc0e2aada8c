"""Where words point in a picture, and how much each of them says about it.

A word's similarities to all visual tokens, softmaxed, are a distribution over places. Its Kullback-Leibler divergence
from the uniform one, in nats, says how much the word tells about where to look: "what" or a colon resembles every place
alike and tells next to nothing, a name tells a lot. There is no threshold, so no single word can win alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.precision import at_least_float32


def distributions(words: Tensor, tokens: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Return softmax over the tokens of cosine / temperature: [B, T, V], in at least float32.

    Args:
        words: [B, T, D].
        tokens: [B, V, D].
        temperature: of the softmax, above 0.
        valid: [B, V] bool, which tokens are there; None = all. Others get 0.
    """
    dtype = at_least_float32(tokens.dtype)
    words, tokens = (F.normalize(x.to(dtype), dim=-1) for x in (words, tokens))
    logits = words @ tokens.transpose(1, 2) / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], torch.finfo(dtype).min)
    return logits.softmax(-1)


def information(places: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the divergence of distributions [B, T, V] from the uniform one over the valid tokens: [B, T], in nats."""
    entropy = -torch.xlogy(places, places).sum(-1)
    if valid is None:
        return (math.log(places.shape[-1]) - entropy).clamp(min=0)
    return (valid.sum(1, keepdim=True).clamp(min=1).log() - entropy).clamp(min=0)


def pointed_at(places: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average distributions [B, T, V] with weights [B, T], scaled to a mean of 1 over the valid tokens: [B, V].

    All weights 0: every valid token gets 1.
    """
    shape = places.shape[0], places.shape[2]
    there = places.new_ones(shape) if valid is None else valid.to(places.dtype)
    count, total = there.sum(1, keepdim=True), weights.sum(1, keepdim=True)
    mean = (weights[:, None] @ places)[:, 0] / total.clamp(min=torch.finfo(places.dtype).tiny)
    return torch.where(total > 0, mean * count, there)


def neighbourhood(x: Tensor, tokens: int, grid: int, cls: bool, radius: int) -> Tensor:
    """Blur [B, V] over the grids of the pictures it consists of: a Gaussian of 2 / 3 of `radius`, cut off behind it.

    Args:
        x: [B, V]; V is a multiple of `tokens`.
        tokens: per picture: grid * grid patches, before them a CLS token if `cls`, which gets 0.
        grid: patches per side.
        radius: in patches; 0 = nothing is blurred.

    Returns:
        [B, V]. Beyond the edge of a picture is nothing.
    """
    place = torch.arange(grid, device=x.device, dtype=x.dtype)
    distance = (place[:, None] - place).abs()
    kernel = torch.exp(-((distance * 1.5 / max(radius, 1)) ** 2) / 2) * (distance <= radius)
    kernel = kernel / (2 * kernel[0].sum() - kernel[0, 0])
    pictures = x.reshape(-1, tokens)[:, int(cls) :].unflatten(-1, (grid, grid))
    blurred = kernel @ pictures @ kernel
    return F.pad(blurred.flatten(-2), (int(cls), 0)).reshape(x.shape)
