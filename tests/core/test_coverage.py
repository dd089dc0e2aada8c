"""Greedy coverage and distance against naive restatements, and the greedy bound against the best choice there is."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.coverage import Cover, balanced, facility_location, farthest_first, over_mean
from sparsevlm.core.diversity import cosine_matrix, max_min


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best(scores: dict[int, float]) -> int:
    """The first index of highest score."""
    return max(sorted(scores), key=scores.get)


def cover_by_hand(s, count, weight=None, covered=None, saturation=math.inf, floor=0.0, modular=None, valid=None):
    rows, tokens = len(s), len(s[0])
    weight, covered = weight or [1.0] * tokens, covered or [1.0] * rows
    modular, valid = modular or [0.0] * tokens, valid or [True] * tokens
    held, chosen = [floor] * rows, []
    for _ in range(count):
        left = [i for i in range(tokens) if valid[i] and i not in chosen]
        left = left or [i for i in range(tokens) if i not in chosen][:1]  # those that are not valid: by index
        gains = {
            i: weight[i] * sum(covered[r] * max(0.0, min(s[r][i], saturation) - held[r]) for r in range(rows))
            + modular[i]
            for i in left
        }
        chosen.append(best(gains))
        held = [max(held[r], min(s[r][chosen[-1]], saturation)) for r in range(rows)]
    return chosen


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data(), st.integers(0, 99))
def test_facility_location(rows, tokens, data, seed):
    s = draw(seed, 2, rows, tokens)
    options = {
        "weight": draw(seed + 1, 2, tokens).abs() + 0.1,
        "covered": draw(seed + 2, 2, rows).abs() + 0.1,
        "modular": draw(seed + 3, 2, tokens) * 0.3,
        "valid": draw(seed + 4, 2, tokens) > -0.5,
    }
    used = data.draw(st.sets(st.sampled_from(sorted(options))))
    limits = {"saturation": 0.9, "floor": -0.4}
    limits = {k: limits[k] for k in data.draw(st.sets(st.sampled_from(sorted(limits))))}
    chosen = facility_location(s, tokens, **{k: options[k] for k in used}, **limits)
    for n in range(2):
        own = {k: options[k][n].tolist() for k in used}
        assert chosen[n].tolist() == cover_by_hand(s[n].tolist(), tokens, **own, **limits)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.data(), st.integers(0, 99))
def test_farthest_first(t, data, seed):
    c = cosine_matrix(draw(seed, 2, t, 3))
    weight = draw(seed + 1, 2, t).abs() + 0.1
    start = (draw(seed + 2, 2, t) > 0.3) if data.draw(st.booleans()) else None
    cap = data.draw(st.sampled_from([0.3, 1.0, 2.0]))
    count = t if start is None else t - int(start.sum(1).max())
    chosen = farthest_first(c, count, weight, cap, start)
    assert chosen.shape == (2, count)
    for n in range(2):
        held = [] if start is None else start[n].nonzero().flatten().tolist()
        picked = []
        for _ in range(count):
            far = {i: min([cap, *(1 - float(c[n, i, j]) for j in held + picked)]) for i in range(t)}
            left = {i: float(weight[n, i]) * far[i] for i in range(t) if i not in held + picked}
            picked.append(best(left))
        assert chosen[n].tolist() == picked


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 99), st.booleans())
def test_balanced(t, seed, some):
    c, r = cosine_matrix(draw(seed, 2, t, 3)), draw(seed + 1, 2, t).abs()
    valid = draw(seed + 2, 2, t) > -0.5 if some else torch.ones(2, t, dtype=torch.bool)
    chosen = balanced(r, c, t, 0.7, 0.4, valid if some else None)
    for n in range(2):
        real = valid[n].nonzero().flatten().tolist()
        picked = [best({i: float(r[n, i]) for i in real})] if real else []
        while len(picked) < len(real):
            left = [i for i in real if i not in picked]
            near = [max(float(c[n, i, j]) for j in picked) for i in range(t)]
            terms = [
                {i: float(r[n, i]) for i in left},
                {i: sum(max(0.0, float(c[n, i, j]) - near[j]) for j in left) for i in left},
                {i: 1 - near[i] for i in left},
            ]
            means = [sum(x.values()) / len(left) for x in terms]
            picked.append(
                best({i: sum(w * x[i] / m for w, x, m in zip((1, 0.7, 0.4), terms, means, strict=True)) for i in left})
            )
        assert chosen[n].tolist()[: len(real)] == picked


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 99))
def test_greedy_coverage_is_within_its_bound_of_the_best_set(t, count, seed):
    count, c = min(count, t), cosine_matrix(draw(seed, 1, t, 3))

    def value(picked) -> float:
        return float(c[0][:, list(picked)].amax(1).clamp(min=0).sum())

    most = max(value(s) for s in itertools.combinations(range(t), count))
    assert value(facility_location(c, count)[0].tolist()) >= (1 - 1 / math.e) * most - 1e-9


def test_an_order_is_the_beginning_of_a_longer_one_and_coverage_grows():
    c, w = cosine_matrix(draw(0, 2, 40, 5)), draw(1, 2, 40).abs()
    for choose in (
        lambda n: facility_location(c, n, w, w, 0.8),
        lambda n: farthest_first(c, n, w),
        lambda n: balanced(w, c, n, 1.0, 0.5),
    ):
        order = choose(40)
        assert all(row.sort().values.tolist() == list(range(40)) for row in order)
        for n in (0, 1, 7, 39):
            assert choose(n).tolist() == order[:, :n].tolist()
    cover, total = Cover(c), [torch.zeros(2, dtype=c.dtype)]
    for pick in facility_location(c, 40, w).T:
        cover.add(pick[:, None])
        total.append(cover.best.sum(1))
    assert bool((torch.stack(total).diff(dim=0) >= 0).all())


def test_equal_scores_go_by_index_and_nothing_is_chosen_twice():
    same = torch.ones(1, 6, 6)
    for chosen in (
        facility_location(same, 6),
        farthest_first(same, 6),
        balanced(torch.ones(1, 6), same, 6, 1.0, 1.0),
        facility_location(-same, 6, saturation=0.5),
    ):
        assert chosen.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_special_cases():
    c = cosine_matrix(draw(3, 2, 30, 4))
    weight = draw(4, 2, 30).abs()
    alone = torch.eye(30, dtype=c.dtype).expand(2, -1, -1)
    assert facility_location(alone, 30, weight).tolist() == (-weight).argsort(1).tolist()
    assert facility_location(c, 9, weight * 7).tolist() == facility_location(c, 9, weight).tolist()
    free = farthest_first(c, 9, cap=2.0)  # the same distances as DivPrune's, from another first token
    first = max_min(1 - c, 9)
    held = torch.zeros(2, 30, dtype=torch.bool).scatter(1, first[:, :1], True)
    assert farthest_first(c, 8, cap=2.0, start=held).tolist() == first[:, 1:].tolist() != free[:, 1:].tolist()


def test_rows_without_weight_are_as_good_as_none_and_half_precision_counts_in_float32():
    s = draw(5, 1, 6, 8)
    wide = torch.cat([s, draw(6, 1, 2, 8)], 1)
    covered = torch.tensor([[1.0] * 6 + [0.0] * 2])
    assert facility_location(wide, 8, covered=covered).tolist() == facility_location(s, 8).tolist()
    assert Cover(s.to(torch.bfloat16)).gain().dtype == torch.float32


def test_over_mean():
    x = torch.tensor([[1.0, 3.0, 100.0], [0.0, 0.0, 5.0]])
    among = torch.tensor([[True, True, False]] * 2)
    assert over_mean(x, among).tolist() == [[0.5, 1.5, 50.0], [0.0, 0.0, 0.0]]


def test_similarities_may_carry_gradients():
    x = draw(7, 1, 12, 4)
    free = cosine_matrix(x.clone().requires_grad_())
    assert facility_location(free, 5).tolist() == facility_location(cosine_matrix(x), 5).tolist()
    assert farthest_first(free, 5).tolist() == farthest_first(cosine_matrix(x), 5).tolist()
