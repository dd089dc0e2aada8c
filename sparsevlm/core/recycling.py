"""Token recycling: density-peak clustering of dropped tokens and their merging (SparseVLM section 3.3, eq. 8-10).

The released code, not the text, made the published numbers where they differ: Euclidean distances / sqrt(D) instead of
cosine, mean instead of sum, k of the k-nearest-neighbour density = number of clusters (utils.py:177-232).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevlm.core.precision import at_least_float32


def recycled_counts(dropped: int, share: float = 0.3, cluster_share: float = 0.1) -> tuple[int, int]:
    """Return how many dropped tokens are recycled, and into how many: int(0.3 n) + 1 and int(0.1 m) + 1.

    Source: authors' modelling_sparse_llama.py:281-299 (tau and theta of eq. 8 and 9). Zero dropped: (0, 0).
    """
    if dropped <= 0 or share <= 0:
        return 0, 0
    pool = min(int(dropped * share) + 1, dropped)
    return pool, min(int(pool * cluster_share) + 1, pool)


def density_peaks(x: Tensor, clusters: Tensor | None, width: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster tokens by density peaks (DPC-kNN).

    Density of i = exp(-mean of the squared distances to its k nearest neighbours, itself included), k = clusters;
    separation = distance to the nearest denser token (the densest: the largest distance of all pairs); the tokens of
    largest density x separation are centres; every other token joins its nearest centre. Distances are Euclidean,
    divided by sqrt(D).
    Ties are systematic: at k = 1 all densities are equal, at k = 2 those of mutual neighbours. None of two equal tokens
    is denser, and of equal density x separation the lower index comes first (tokens come in order of score). The
    authors add 1e-6 x uniform noise instead, which makes their result random in float32 and vanishes in float16; ours
    is their code without the noise, deterministic and the same in every batch.

    Args:
        x: [B, m, D] tokens.
        clusters: [B] int64, number of clusters per sample, 1 <= clusters <= its number of valid tokens; None = `width`.
        width: largest entry of `clusters`, known to the host.
        valid: [B, m] bool; None = all, and `clusters` the same for all samples.

    Returns:
        centres [B, width]: indices into m in order of density x separation (entries beyond `clusters` are arbitrary
        but distinct), and the cluster [B, m] of each token, in 0 ... clusters - 1.
    """
    batch, m, size = x.shape
    if valid is None and width == 1:  # all densities are equal: the first token is the centre, of all
        none = torch.zeros(batch, m, dtype=torch.int64, device=x.device)
        return none[:, :1], none
    square = _squared_distances(x)
    if valid is None:
        density = square.topk(width, dim=-1, largest=False).values.mean(-1).mul_(-1 / size).exp_()
        largest = square.amax((1, 2), keepdim=True)
    else:
        assert clusters is not None  # goes with `valid`
        own = torch.arange(width, device=x.device).expand(batch, -1)
        real = own < clusters[:, None]
        nearest = square.masked_fill(~valid[:, None], float("inf")).topk(width, dim=-1, largest=False).values
        density = nearest.masked_fill(~real[:, None], 0).sum(-1) / clusters[:, None].clamp(min=1)
        density = density.mul_(-1 / size).exp_().masked_fill_(~valid, -1)
        largest = square.masked_fill(~(valid[:, None] & valid[..., None]), 0).amax((1, 2), keepdim=True)
    denser = density[:, None] > density[..., None]  # [B, i, j]: j is denser than i
    peak = torch.where(denser, square, largest).amin(-1).sqrt_().mul_(density)
    if valid is not None:
        peak = peak.masked_fill(~valid, float("-inf"))
    centres = peak.sort(dim=1, descending=True, stable=True).indices[:, :width]
    to_centre = square.gather(1, centres[..., None].expand(-1, -1, m))
    if valid is None:
        to_centre.scatter_(2, centres[..., None], -1)  # a centre is its own, even beside its double
        return centres, to_centre.argmin(1)
    group = to_centre.masked_fill(~real[..., None], float("inf")).argmin(1)
    return centres, group.scatter(1, centres, torch.where(real, own, group.gather(1, centres)))


def _squared_distances(x: Tensor) -> Tensor:
    """Compute squared Euclidean distances of [B, m, D] tokens -> [B, m, m] float32 (float64 stays), exactly symmetric.

    By one matrix product in float64: in float32 the difference of large squares would lose small distances between
    large states, and differencing every pair (torch.cdist without a product) costs as much as the rest of pruning.
    """
    dtype = at_least_float32(x.dtype)
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # mps has no float64
    product = x @ x.transpose(1, 2)
    norm = product.diagonal(dim1=1, dim2=2)
    square = (norm[:, :, None] + norm[:, None]).sub_(product, alpha=2)
    # a product need not be symmetric to the last bit; the smaller of both triangles is
    return torch.minimum(square, square.transpose(1, 2)).clamp_(min=0).to(dtype)


def merge_weights(
    group: Tensor, width: int, valid: Tensor | None = None, how: str = "mean", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Make the weights [B, width, m] of `dtype` that turn m tokens into `width` merged ones: weights @ tokens.

    Args:
        group: [B, m] cluster of each token.
        width: number of clusters.
        valid: [B, m] bool, None = all.
        how: "mean" (the authors' code) or "sum" (eq. 10).

    Raises:
        ValueError: another `how`.
    """
    if how not in ("mean", "sum"):
        raise ValueError(f"unknown merge {how!r}. Use mean or sum")
    weights = torch.zeros(group.shape[0], width, group.shape[1], dtype=dtype, device=group.device)
    if valid is None:
        weights.scatter_(1, group[:, None], 1)
    else:
        weights.scatter_(1, group[:, None], valid[:, None].to(dtype))
    # 1e-6 as in the authors' utils.py:229
    return weights.div_(weights.sum(-1, keepdim=True).add_(1e-6)) if how == "mean" else weights
