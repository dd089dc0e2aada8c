"""The mathematics of the methods that act before the language model, against naive restatements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.diversity import cosine_matrix, dpp_greedy, max_min, remove_duplicates
from sparsevlm.core.merging import match, merge_mean, merge_schedule, merge_sum, most_removable, survivors
from sparsevlm.methods.ficoco_v import FiCoCoV, compress, spread
from sparsevlm.methods.visionzip import contextual_tokens
from sparsevlm.runtime.vision import share


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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3000), st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_share(budget, sizes):
    budget = min(budget, sum(sizes))
    counts = share(budget, sizes)
    assert sum(counts) == budget and all(0 <= c <= s for c, s in zip(counts, sizes, strict=True))
    if len({*sizes}) == 1:
        assert counts == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1


def test_spread():
    for left, rates in ((191, {35}), (192, {34, 35}), (128, {40, 41}), (64, {46, 47})):
        after = [576, *spread(576, left, 11)]
        assert {a - b for a, b in zip(after, after[1:], strict=False)} == rates and after[-1] == left
    assert math.isclose((576 - 192) / 11, 34.9, abs_tol=0.05)
