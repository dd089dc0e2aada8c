"""Greedy choice of tokens that cover all others (facility location), or that lie far from those chosen.

`greedy` chooses one token after the other. What a token is worth may depend on those chosen so far through a `Cover`
(how much better all rows are covered with it) or a `Spread` (its distance to the nearest chosen one). Ready-made rules:
`facility_location`, `farthest_first` and `balanced`.

An order of choice does not depend on how many are asked for: the first t of T are the choice of t. Each step costs one
pass over the similarities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsevlm.core.precision import at_least_float32


class Cover:
    """How well each row is covered by the chosen tokens: by the most similar one.

    Attributes:
        best: [B, R] similarity of the nearest chosen token, at least `floor`, at most `saturation`.
    """

    def __init__(
        self, similarity: Tensor, covered: Tensor | None = None, saturation: float | None = None, floor: float = 0.0
    ):
        """Begin with nothing chosen.

        Args:
            similarity: [B, R, N] of rows that shall be covered and tokens that can be chosen.
            covered: [B, R] weights of the rows, 0 for one that is not there; None = all 1.
            saturation: a row that is covered this well gains nothing more; None = no limit.
            floor: how well a row is covered when nothing is chosen. Lower similarities never count.
        """
        similarity = similarity.to(at_least_float32(similarity.dtype))
        if saturation is not None:
            similarity = similarity.clamp(max=saturation)
        self.by_token = similarity.transpose(1, 2).contiguous()  # [B, N, R]
        self.weights = None if covered is None else covered.to(similarity.dtype)
        self.best = similarity.new_full(similarity.shape[:2], floor)
        self._more = torch.empty_like(self.by_token)  # allocating it anew takes longer than filling it

    def gain(self) -> Tensor:
        """[B, N] what each token would add to the coverage: sum over rows of weight * max(0, similarity - best)."""
        more = torch.sub(self.by_token, self.best[:, None], out=self._more).clamp_(min=0)
        return more.sum(2) if self.weights is None else (more @ self.weights[..., None])[..., 0]

    def add(self, pick: Tensor) -> None:
        """Choose the token `pick` [B, 1] of each sample."""
        self.best = torch.maximum(self.best, _row(self.by_token, pick))


class Spread:
    """How far each token lies from the nearest chosen one.

    Attributes:
        far: [B, N] distance = 1 - similarity, at most `cap`.
    """

    def __init__(self, similarity: Tensor, cap: float = 1.0, start: Tensor | None = None):
        """Begin with the tokens `start` [B, N] bool chosen; None = nothing.

        Args:
            similarity: [B, N, N].
            cap: the distance that counts as far, also that to nothing.
        """
        self.similarity = similarity.to(at_least_float32(similarity.dtype))
        self.cap = cap
        self.far = self.similarity.new_full(similarity.shape[::2], cap)
        if start is not None:
            distance = (1 - self.similarity).masked_fill(~start[:, :, None], cap)
            self.far = distance.amin(1)

    def add(self, pick: Tensor) -> None:
        """Choose the token `pick` [B, 1] of each sample."""
        self.far = torch.minimum(self.far, 1 - _row(self.similarity, pick))


@torch.no_grad()
def greedy(
    score: Callable[[Tensor], Tensor],
    parts: Sequence[Cover | Spread],
    count: int,
    valid: Tensor,
    start: Tensor | None = None,
) -> Tensor:
    """Choose tokens one by one, always the one of highest score; equal scores by index.

    Args:
        score: from [B, N] bool, which tokens can still be chosen, to scores [B, N]; it may look at `parts`.
        parts: are told of each choice.
        count: tokens to choose in each sample, at most those that are not in `start`.
        valid: [B, N] bool, which tokens can be chosen. Others come after all of these, by index.
        start: [B, N] bool, tokens that are chosen already, of which `parts` know; None = nothing.

    Returns:
        [B, count] int64 in order of choice, without those of `start`.
    """
    taken = torch.zeros_like(valid) if start is None else start.clone()
    chosen = []
    for _ in range(count):
        scores = score(valid & ~taken)
        last = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
        pick = last.masked_fill_(taken, float("-inf")).argmax(1, keepdim=True)
        taken.scatter_(1, pick, 1)  # torch.jit traces no bools
        for part in parts:
            part.add(pick)
        chosen.append(pick)
    return torch.cat(chosen, 1) if chosen else taken.new_empty(taken.shape[0], 0, dtype=torch.int64)


def facility_location(
    similarity: Tensor,
    count: int,
    weight: Tensor | None = None,
    covered: Tensor | None = None,
    saturation: float | None = None,
    floor: float = 0.0,
    modular: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Choose tokens that cover all rows: highest weight_i * sum_r covered_r * max(0, similarity_ri - best_r) first.

    Args:
        similarity: [B, R, N], of R rows that shall be covered and N tokens that can be chosen.
        count: tokens to choose.
        weight: [B, N] factors of the tokens' gains; None = 1. An exponent is the caller's.
        covered, saturation, floor: of the rows, see `Cover`.
        modular: [B, N] is added to the (weighted) gains; None = 0.
        valid: [B, N] bool, which tokens can be chosen; None = all. It says nothing of rows: see `covered`.

    Returns:
        [B, count] int64 in order of choice.
    """
    cover = Cover(similarity, covered, saturation, floor)

    def score(left: Tensor) -> Tensor:
        gain = cover.gain() if weight is None else cover.gain() * weight
        return gain if modular is None else gain + modular

    return greedy(score, [cover], count, _all(similarity, valid))


def farthest_first(
    similarity: Tensor,
    count: int,
    weight: Tensor | None = None,
    cap: float = 1.0,
    start: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Choose tokens that lie far from those chosen: highest weight_i * min(cap, 1 - similarity to the nearest) first.

    Args:
        similarity: [B, N, N].
        count: tokens to choose beside those of `start`.
        weight: [B, N] factors; None = 1.
        cap: the distance that counts as far, also that to nothing.
        start: [B, N] bool, tokens that are chosen already; None = nothing: the first one is that of highest weight.
        valid: [B, N] bool, which tokens can be chosen; None = all.

    Returns:
        [B, count] int64 in order of choice.
    """
    spread = Spread(similarity, cap, start)

    def score(left: Tensor) -> Tensor:
        return spread.far if weight is None else spread.far * weight

    return greedy(score, [spread], count, _all(similarity, valid), start)


def balanced(
    relevance: Tensor,
    similarity: Tensor,
    count: int,
    coverage: float | Tensor,
    diversity: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Choose by the sum of relevance, coverage and diversity, each over its mean over the tokens that are left.

    TOPS (arXiv 2606.27161), algorithms 1 and 2: the most relevant token first; then the highest
    r / mean(r) + coverage * c / mean(c) + diversity * d / mean(d), where d is 1 - similarity to the nearest chosen
    token, and c what the token adds to the coverage of those that are left.

    Args:
        relevance: [B, N], not negative.
        similarity: [B, N, N] cosines.
        count: tokens to choose.
        coverage, diversity: weights of the second and third term; of the second also [B, 1].
        valid: [B, N] bool, which tokens there are; None = all. Others are not covered either.

    Returns:
        [B, count] int64 in order of choice.
    """
    cover, spread = Cover(similarity, valid, floor=-1.0), Spread(similarity, cap=2.0)
    relevance = relevance.to(spread.far.dtype)
    begun = False

    def score(left: Tensor) -> Tensor:
        nonlocal begun
        if not begun:
            begun = True
            return relevance
        c, d = over_mean(cover.gain(), left), over_mean(spread.far, left)
        return over_mean(relevance, left) + coverage * c + diversity * d

    return greedy(score, [cover, spread], count, _all(similarity, valid))


def over_mean(x: Tensor, among: Tensor) -> Tensor:
    """Divide `x` [B, N] by its mean over the entries `among` [B, N] bool; where that is 0, everything is 0."""
    total = x.masked_fill(~among, 0).sum(1, keepdim=True)
    mean = total / among.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mean == 0, 0, x / mean)


def _all(similarity: Tensor, valid: Tensor | None) -> Tensor:
    shape = similarity.shape[0], similarity.shape[2]
    return torch.ones(shape, dtype=torch.bool, device=similarity.device) if valid is None else valid


def _row(by_token: Tensor, pick: Tensor) -> Tensor:
    """Rows [B, M] of [B, N, M] at `pick` [B, 1]."""
    return by_token.gather(1, pick[..., None].expand(-1, -1, by_token.shape[2]))[:, 0]
