"""Bipartite merging against naive restatements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.merging import match, merge_mean, merge_schedule, merge_sum, most_removable, survivors


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 17), st.floats(0, 1), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_bipartite_merging(t, part, protect, ordered, penalised, seed):
    r = int(part * most_removable(t, protect))
    metric, x, size = draw(seed, 2, t, 5), draw(seed + 1, 2, t, 3), 1 + draw(seed + 2, 2, t, 1).abs()
    penalty = draw(seed + 3, 2, t) if penalised else None
    pairs = match(metric, r, penalty, protect, ordered)
    merged, total = merge_mean(x, pairs, size), merge_sum(size, pairs)
    index = survivors(torch.arange(t).expand(2, -1), pairs)
    for n in range(2):
        proposals = []
        for i in range(0, t, 2):
            if protect and i == 0:
                continue
            j = max(range(1, t, 2), key=lambda j, i=i: cosine(metric[n, i], metric[n, j]))
            worth = cosine(metric[n, i], metric[n, j]) - (float(penalty[n, i]) if penalised else 0)
            proposals.append((worth, i, j))
        proposals.sort(reverse=True)
        gone = {i: j for _, i, j in proposals[:r]}
        rest = [i for _, i, _ in proposals[r:]]
        first = ([0] if protect else []) + rest
        if not ordered and protect:
            first = rest + [0]  # never proposed: the least similar
        if ordered:
            first = sorted(first)
        order = first + list(range(1, t, 2))
        assert index[n].tolist() == order
        for place, i in enumerate(order):
            members = [i, *(a for a, b in gone.items() if b == i)]
            weight = size[n, members]
            torch.testing.assert_close(total[n, place], weight.sum(0))
            torch.testing.assert_close(merged[n, place], (x[n, members] * weight).sum(0) / weight.sum(0))
    torch.testing.assert_close(total.sum(), size.sum())


def test_a_pass_cannot_remove_more_than_half():
    assert [most_removable(t, True) for t in (1, 2, 3, 576, 577)] == [0, 0, 1, 287, 288]
    with pytest.raises(ValueError, match="at most 288 away, not 289"):
        match(draw(0, 1, 577, 2), 289)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.integers(1, 24), st.floats(0, 1))
def test_merge_schedule(tokens, blocks, part):
    left = max(1, int(part * tokens))
    removed = merge_schedule(tokens, left, blocks)
    assert len(removed) == blocks and sum(removed) == tokens - left and min(removed) >= 0
    now, one_pass = tokens, True
    for r in removed:
        one_pass &= r <= most_removable(now + 1, True)
        now -= r
    assert one_pass == (left * 2**blocks >= tokens)


@pytest.mark.parametrize("left,two", [(192, {16, 17}), (128, {19, 20}), (64, {22, 23})])
def test_merge_schedule_of_llava(left, two):
    removed = merge_schedule(576, left, 23)
    assert set(removed) == two and sum(removed) == 576 - left
    ends = torch.tensor(removed).cumsum(0)
    assert (ends - torch.arange(1, 24) * (576 - left) / 23).abs().max() <= 0.5  # in turn, not one kind first
