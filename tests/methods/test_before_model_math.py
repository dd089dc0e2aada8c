"""The mathematics of VisionZip and FiCoCo-V against naive restatements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.methods.ficoco_v import FiCoCoV, compress, spread
from sparsevlm.methods.visionzip import contextual_tokens


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 25), st.integers(1, 8), st.integers(0, 99))
def test_contextual_tokens(m, count, seed):
    count = min(count, m - 1)
    states, keys = draw(seed, 2, m, 3), draw(seed + 1, 2, m, 4)
    merged = contextual_tokens(states, keys, count)
    stride = m // count
    targets = [i * stride for i in range(count)]
    for n in range(2):
        joined = {i: [] for i in targets}
        for i in set(range(m)) - set(targets):
            joined[max(targets, key=lambda j: cosine(keys[n, i], keys[n, j]))].append(states[n, i])
        want = [states[n, i] + (sum(joined[i]) / len(joined[i]) if joined[i] else 0) for i in targets]
        torch.testing.assert_close(merged[n], torch.stack(want))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 20), st.integers(1, 18), st.sampled_from([0.0, 0.5, 0.9, 0.998, 1.0]), st.integers(0, 99))
def test_correlate_and_compress(t, drop, eps, seed):
    drop = min(drop, t - 2)
    x, attention = draw(seed, 2, t, 3), draw(seed + 1, 2, t, t).softmax(-1)
    order = draw(seed + 2, 2, t - 1).argsort(1) + 1
    gone, stay = order[:, :drop], order[:, drop:].sort(1).values
    got = compress(x, attention, gone, stay, eps)
    for n in range(2):
        top, bottom = x[n][stay[n]].clone(), torch.ones(len(stay[n]), dtype=x.dtype)
        for i in gone[n]:
            row = attention[n, i][stay[n]]
            c = torch.where(row >= row.quantile(eps) - 1e-15, row, 0)
            alpha = c / c.sum()
            top += alpha[:, None] * x[n, i]
            bottom += alpha
        torch.testing.assert_close(got[n], top / bottom[:, None])


@pytest.mark.parametrize("grid,window", [(6, 2), (5, 2), (6, 3), (6, 1)])
def test_local_penalty(grid, window):
    t = grid * grid - 3  # some patches are gone already
    places = torch.stack([torch.randperm(grid * grid, generator=torch.Generator().manual_seed(s))[:t] for s in (0, 1)])
    attention = draw(5, 2, t + 1, t + 1).mul(2).softmax(-1)
    method = FiCoCoV(lam=0.6, window=window, scaling=3.0)
    got = method.redundancy(attention, places, grid)
    for n in range(2):
        score = [0.6 * float(attention[n, i, 1:].mean()) - 0.4 * float(attention[n, 0, i]) for i in range(1, t + 1)]
        seen: dict[tuple, list[int]] = {}
        for i, place in enumerate(places[n].tolist()):
            seen.setdefault((place // grid // window, place % grid // window), []).append(i)
        want = list(score)
        for members in seen.values():
            best = max(members, key=lambda i: score[i])
            if window > 1:
                want[best] = score[best] * 3 if score[best] > 0 else score[best] / 3
        torch.testing.assert_close(got[n], torch.tensor(want, dtype=got.dtype))
    assert (got > 0).any() and (got < 0).any()


def test_spread():
    for left, rates in ((191, {35}), (192, {34, 35}), (128, {40, 41}), (64, {46, 47})):
        after = [576, *spread(576, left, 11)]
        assert {a - b for a, b in zip(after, after[1:], strict=False)} == rates and after[-1] == left
    assert math.isclose((576 - 192) / 11, 34.9, abs_tol=0.05)
