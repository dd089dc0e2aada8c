"""Bipartite merging of tokens (ToMe, arXiv 2210.09461; FOLDER, arXiv 2501.02430; AIM, arXiv 2412.03248).

Tokens are dealt alternately into A (even places) and B (odd places); every A token proposes the most similar B token,
the best proposals are merged. Sums are matrix products with one-hot weights, so that they are deterministic on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.packing import take


@dataclass
class Matching:
    """The outcome of a match: the tokens of A that stay, and those that are merged into tokens of B.

    Attributes:
        unmerged: [n, |A| - r] int64, places in A.
        source: [n, r] int64, places in A, best proposal first.
        target: [n, r] int64, the places in B they are merged into.
    """

    unmerged: Tensor
    source: Tensor
    target: Tensor


def match(
    metric: Tensor, r: int, penalty: Tensor | None = None, protect_first: bool = True, ordered: bool = True
) -> Matching:
    """Find the `r` most similar pairs.

    Args:
        metric: [n, t, d] what similarity (cosine) is measured on.
        r: tokens to remove, at most `most_removable(t, protect_first)`.
        penalty: [n, t] subtracted from the proposals of each token (its entries in A count).
        protect_first: never merge token 0 away (CLS).
        ordered: leave unmerged tokens in their order (ToMe with a class token), else from high to low similarity.

    Raises:
        ValueError: more tokens to remove than the half that A is.
    """
    most = most_removable(metric.shape[1], protect_first)
    if not 0 <= r <= most:
        raise ValueError(f"one pass over {metric.shape[1]} tokens can merge at most {most} away, not {r}")
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    best, target = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    if penalty is not None:
        best = best - penalty[:, ::2]
    if protect_first:
        best = torch.cat([torch.full_like(best[:, :1], float("-inf")), best[:, 1:]], 1)
    order = best.argsort(dim=1, descending=True, stable=True)
    source, unmerged = order[:, :r], order[:, r:]
    if ordered:
        unmerged = unmerged.sort(1).values
    return Matching(unmerged, source, target.gather(1, source))


def most_removable(tokens: int, protect_first: bool) -> int:
    """Return how many tokens one pass can remove: those of A, or none if there is no B to merge them into."""
    return tokens - tokens // 2 - int(protect_first) if tokens > 1 else 0


def merge_sum(x: Tensor, matching: Matching) -> Tensor:
    """Sum merged tokens: [n, t, d] -> [n, t - r, d] in at least float32; unmerged A first, then B."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = x[:, ::2], x[:, 1::2]
    member = matching.target[:, None] == torch.arange(b.shape[1], device=x.device)[:, None]
    return torch.cat([take(a, matching.unmerged), b + member.to(x.dtype) @ take(a, matching.source)], 1)


def merge_mean(x: Tensor, matching: Matching, size: Tensor | None = None) -> Tensor:
    """Average merged tokens, weighted by `size` [n, t, 1] (None: equally); shape of `merge_sum`, dtype of `x`."""
    if size is None:
        size = torch.ones_like(x[..., :1])
    return (merge_sum(x * size, matching) / merge_sum(size, matching)).to(x.dtype)


def survivors(index: Tensor, matching: Matching) -> Tensor:
    """Select from `index` [n, t] the entries [n, t - r] of the tokens that `merge_sum` leaves, in its order."""
    return torch.cat([index[:, ::2].gather(1, matching.unmerged), index[:, 1::2]], 1)


def merge_schedule(tokens: int, left: int, blocks: int) -> list[int]:
    """Spread merging over `blocks` blocks so that `left` of `tokens` stay (a protected one not counted).

    Every block merges the same number away, floors and ceilings in turn. A pass can at most halve: where later blocks
    cannot do their share, earlier ones do the rest. If halving in every block leaves more than `left`, the first entry
    is more than one pass can do.

    Returns:
        tokens to merge away in each block.
    """
    after = [tokens - ((tokens - left) * (i + 1) * 2 + blocks) // (2 * blocks) for i in range(blocks)]
    after[-1] = left
    for i in reversed(range(blocks - 1)):
        after[i] = min(after[i], 2 * after[i + 1])
    return [a - b for a, b in zip([tokens, *after], after, strict=False)]
