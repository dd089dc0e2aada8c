"""Choosing diverse tokens against naive restatements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.diversity import cosine_matrix, dpp_greedy, max_min, remove_duplicates


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(1, 12), st.integers(0, 99))
def test_max_min_diversity(t, count, seed):
    count, x = min(count, t), draw(seed, 2, t, 4)
    distance = 1 - cosine_matrix(x)
    chosen = max_min(distance, count)
    for n in range(2):
        d = distance[n].tolist()  # the two tokens of a lonely pair may tie, up to the last bit
        assert d[0][1] == pytest.approx(1 - cosine(x[n, 0], x[n, 1]))
        picked = [max(range(t), key=lambda i: min(d[j][i] for j in range(t) if j != i))]
        while len(picked) < count:
            picked.append(max((i for i in range(t) if i not in picked), key=lambda i: min(d[j][i] for j in picked)))
        assert chosen[n].tolist() == picked


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_greedy_dpp_maximises_the_determinant_step_by_step(t, count, seed):
    count, x = min(count, t), draw(seed, 2, t, 12)
    kernel = x @ x.transpose(1, 2)
    chosen = dpp_greedy(kernel, count)
    for n in range(2):
        picked: list[int] = []
        for _ in range(count):
            sets = {i: [*picked, i] for i in range(t) if i not in picked}
            picked.append(max(sets, key=lambda i: float(torch.det(kernel[n][sets[i]][:, sets[i]]))))
        assert chosen[n].tolist() == picked


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(0, 30), st.integers(1, 8), st.integers(0, 99))
def test_duplicate_removal(m, count, step, seed):
    count = min(count, m)
    similarity = cosine_matrix(draw(seed, 2, m, 3))
    order = draw(seed + 1, 2, m).argsort(1)
    left = remove_duplicates(similarity, order, count, step)
    for n in range(2):
        now = order[n].tolist()
        while len(now) > count > 0:
            a, b = now[::2], now[1::2]
            a.sort(key=lambda i: -max(float(similarity[n, i, j]) for j in b))
            now = a[min(step, len(now) - count, len(a)) :] + b
        assert left[n].tolist() == now[: count or 0]
