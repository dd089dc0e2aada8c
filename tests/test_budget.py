"""From a budget to a schedule: the authors' lists, any budget elsewhere, and what a run really does."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparsevlm
from sparsevlm.budget import check_budget, explicit_schedule, mean_entering, mean_leaving, scale_layers, solve
from sparsevlm.core.recycling import recycled_counts
from tests.tiny import EARLY_DROP, inputs, llava

V15 = sparsevlm.methods.method_class("sparsevlm").lists
PLUS = sparsevlm.methods.method_class("sparsevlm_plus").lists


@pytest.mark.parametrize(
    "budget,keep,leaving,entering",
    [
        (192, (300, 200, 110), 192.03125, 206.5),
        (128, (303, 110, 36), 128.625, 145.40625),
        (96, (238, 48, 26), 96.9375, 114.09375),
        (64, (66, 30, 17), 64.8125, 82.25),
    ],
)
def test_the_authors_lists_are_fixed_points(budget, keep, leaving, entering):
    schedule = sparsevlm.build("sparsevlm", budget=budget).plan(576, 32)
    assert schedule.layers == (2, 6, 15) and schedule.keep == keep
    assert schedule.leaving == leaving and schedule.entering == entering
    assert schedule == sparsevlm.build("sparsevlm", layers=(2, 6, 15), keep=keep).plan(576, 32)


@pytest.mark.parametrize(
    "budget,keep,leaving,entering",
    [
        (192, (300, 200, 118), 192.4375, 206.75),
        (128, (238, 108, 60), 128.0, 144.125),
        (96, (246, 54, 28), 96.8125, 113.9375),
        (64, (66, 34, 20), 64.4375, 81.8125),
    ],
)
def test_the_authors_lists_of_plus_are_fixed_points(budget, keep, leaving, entering):
    schedule = sparsevlm.build("sparsevlm_plus", budget=budget).plan(576, 32)
    assert schedule.layers == (2, 6, 15) and schedule.keep == schedule.after == keep
    assert schedule.leaving == leaving and schedule.entering == entering


def lengths(schedule) -> list[int]:
    """Visual tokens leaving each layer, counted layer by layer."""
    count, out = schedule.n_visual, []
    for layer in range(schedule.n_layers):
        if layer in schedule.layers:
            count = schedule.after[schedule.layers.index(layer)]
        out.append(count)
    return out


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 3000), st.integers(2, 80), st.booleans())
def test_any_budget_is_met_to_half_a_token(data, n_visual, n_layers, plus):
    budget = data.draw(st.one_of(st.integers(1, n_visual), st.sampled_from([1, n_visual, max(1, n_visual // 9)])))
    method = sparsevlm.build("sparsevlm_plus" if plus else "sparsevlm", budget=budget)
    schedule = method.plan(n_visual, n_layers)
    left = lengths(schedule)
    fixed = (n_visual, n_layers) == (576, 32) and budget in dict(V15)
    assert abs(schedule.leaving - budget) <= (1 if fixed else 0.5)
    assert schedule.leaving == pytest.approx(sum(left) / n_layers)
    assert schedule.entering == pytest.approx((n_visual + sum(left[:-1])) / n_layers)
    assert all(a >= b for a, b in pairwise([n_visual, *left])) and left[-1] >= 1
    assert all(keep >= 1 for keep in schedule.keep)
    assert all(a < b for a, b in pairwise(schedule.layers)) and 0 <= schedule.layers[0]
    assert schedule.layers[-1] <= n_layers - 2
    count = n_visual
    for keep, pool, merged in zip(schedule.keep, schedule.pool, schedule.merged, strict=True):
        expected = (0, 0) if plus else recycled_counts(count - keep)
        assert (pool, merged) in (expected, (0, 0)) and keep + pool <= count
        count = keep + merged


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(2, 1000), st.integers(3, 48))
def test_given_layers_are_used_or_refused(data, n_visual, n_layers):
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, n_layers - 2), min_size=1, max_size=4))))
    budget = data.draw(st.integers(1, n_visual))
    method = sparsevlm.build("sparsevlm", budget=budget, layers=layers)
    floor = mean_leaving(n_visual, layers, [1] * len(layers), n_layers)
    if budget < floor:
        with pytest.raises(ValueError, match=r"out of reach of pruning layers .* at least .*Use earlier layers"):
            method.plan(n_visual, n_layers)
        return
    schedule = method.plan(n_visual, n_layers)
    assert schedule.layers == layers and min(schedule.after) >= 1
    assert abs(schedule.leaving - budget) <= 0.5


def test_a_larger_budget_never_keeps_less_in_all():
    means = [sparsevlm.build("sparsevlm", budget=b).plan(500, 24).leaving for b in range(1, 501)]
    assert all(a < b for a, b in pairwise(means)) and means[-1] == 500


def test_layers_scale_with_depth():
    assert scale_layers(32) == (2, 6, 15)
    assert scale_layers(12) == (1, 2, 6)
    assert scale_layers(40) == (3, 8, 19)
    assert scale_layers(2) == (0,)


@given(st.integers(2, 200))
def test_scaled_layers_ascend_and_fit(n_layers):
    layers = scale_layers(n_layers)
    assert layers and all(a < b for a, b in pairwise(layers)) and 0 <= layers[0] and layers[-1] <= n_layers - 2


def test_a_stage_with_enough_room_drops_nothing_unless_asked():
    assert explicit_schedule(20, 8, (1, 3), (30, 10), 0.3).after[0] == 20
    schedule = explicit_schedule(20, 8, (1, 3), (30, 10), 0.3, always_drop=True)
    assert (schedule.keep[0], schedule.pool[0], schedule.merged[0]) == (19, 1, 1)
    assert explicit_schedule(1, 8, (1,), (30,), 0.3, always_drop=True).keep == (1,)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
@pytest.mark.parametrize("budget", [3, 8, 20, 35, 36])
def test_a_run_reaches_what_the_schedule_says(name, budget, options):
    model = llava()
    x, _ = inputs("ragged", model)
    method = sparsevlm.build(name, budget=budget, **options)
    with torch.no_grad(), method(model) as trace:
        out = model(**x)
    schedules = [method.plan(n, 8) if n else None for n in (36, 72, 0)]
    record = trace.prefills[0]
    assert record.leaving == pytest.approx([s.leaving if s else 0 for s in schedules])
    assert record.entering == pytest.approx([s.entering if s else 0 for s in schedules])
    # cached keys: what enters each layer, padded to the longest sample of the batch
    entering = [[s.n_visual, *lengths(s)[:-1]] if s else [0] * 8 for s in schedules]
    text = [14, 19, 11]
    longest = [max(t + e[i] for t, e in zip(text, entering, strict=True)) for i in range(8)]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == longest


@pytest.mark.parametrize(
    "budget,message",
    [
        (0, "budget 0 is below 1"),
        (-1, "budget -1 is below 1"),
        ("abc", "budget 'abc' is neither an integer nor 'full'"),
        (1.5, "budget 1.5 is neither an integer nor 'full'"),
        (1.0, "budget 1.0 may mean one token or all of them. Use 1, or 'full'"),
        (float("nan"), "budget nan is neither an integer nor 'full' nor a share"),
        (float("inf"), "budget inf is neither an integer"),
        (True, "budget True is neither an integer nor 'full'"),
        ([64], r"budget \[64\] is neither an integer nor 'full'"),
    ],
)
@pytest.mark.parametrize("name", ["none", "random", "sparsevlm", "sparsevlm_plus"])
def test_budgets_that_are_none(name, budget, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build(name, budget=budget)


def test_budgets_from_a_command_line():
    assert check_budget("64") == 64 and check_budget(64.0) == 64 and check_budget("full") == "full"


@pytest.mark.parametrize("name", ["random", "sparsevlm", "sparsevlm_plus", "divprune", "visionzip"])
def test_a_budget_above_the_tokens_is_clamped_and_recorded(name):
    """One picture with few tokens does not end a batch."""
    model = llava()
    x, _ = inputs("ragged", model)  # 36 and 72 visual tokens, and none
    with torch.no_grad(), sparsevlm.build(name, budget=37)(model) as trace:
        model(**x)
    record = trace.prefills[0]
    assert record.clamped == [True, False, False]
    assert record.leaving == pytest.approx([36, 37, 0], abs=0.5)


@pytest.mark.parametrize("name", ["random", "sparsevlm", "fastv", "divprune", "fastervlm"])
def test_a_budget_that_is_a_share(name):
    model = llava()
    x, _ = inputs("ragged", model)
    with torch.no_grad(), sparsevlm.build(name, budget=0.25)(model) as trace:
        model(**x)
    record = trace.prefills[0]
    assert record.leaving == pytest.approx([9, 18, 0], abs=0.5)
    assert record.clamped == [False] * 3
    if name in ("divprune", "fastervlm"):  # both pictures get their share
        assert [int((record.stages[0].kept[1] // 36 == i).sum()) for i in (0, 1)] == [9, 9]


def test_shares_in_tokens():
    assert check_budget(0.25) == 0.25 and check_budget("0.25") == 0.25
    assert [check_budget(0.25, n) for n in (1, 2, 9, 10, 576)] == [1, 1, 2, 3, 144]  # half a token counts as one
    assert [check_budget(64, n) for n in (10, 64, 576)] == [10, 64, 64]
    assert check_budget("full", 9) == "full" and check_budget(None, 9) is None


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers": (2, 8), "keep": (9, 5)}, r"pruning layers \[8\] do not fit a model of 8 layers: .* 0 ... 6"),
        ({"layers": (2, 7), "keep": (9, 5)}, r"pruning layers \[7\] do not fit a model of 8 layers"),
        ({"layers": (-2, 3), "keep": (9, 5)}, r"pruning layers \[-2\] do not fit"),
        ({"layers": (3, 2), "keep": (9, 5)}, r"pruning layers \(3, 2\) do not ascend strictly"),
        ({"layers": (3, 3), "keep": (9, 5)}, "do not ascend strictly"),
        ({"layers": (3, 99), "budget": 9}, r"pruning layers \[99\] do not fit"),
    ],
)
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
def test_layers_are_checked_before_anything_runs(name, options, message):
    with pytest.raises(ValueError, match=message), sparsevlm.build(name, **options)(llava()):
        pass


@pytest.mark.parametrize(
    "options,message",
    [
        ({"budget": 64, "keep": (3, 2, 1)}, "budget and keep exclude each other. Use one of them"),
        ({"layers": (1, 2), "keep": (3, 2, 1)}, r"layers \(1, 2\) and keep \(3, 2, 1\) differ in length"),
        ({"keep": (3, 2.5, 1)}, "keep must be integers, not"),
        ({"layers": "abc"}, "layers must be integers, not 'abc'"),
        ({"recycle": 1.5}, "are shares between 0 and 1"),
        ({"cluster": -0.1}, "are shares between 0 and 1"),
    ],
)
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
def test_contradictory_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build(name, **options)


@pytest.mark.parametrize("keep", [(3, 0, 1), (-1, -1, -1)])
def test_keeping_nothing(keep):
    with pytest.raises(ValueError, match="contains a count below 1"):
        sparsevlm.build("sparsevlm", keep=keep).plan(36, 8)


def test_means():
    assert mean_leaving(10, (1, 3), (6, 2), 5) == (10 + 6 + 6 + 2 + 2) / 5
    assert mean_entering(10, (1, 3), (6, 2), 5) == (10 + 10 + 6 + 6 + 2) / 5
    assert mean_entering(10, (-1,), (4,), 5) == mean_leaving(10, (-1,), (4,), 5) == 4


@settings(deadline=None)
@given(st.integers(1, 64))
@example(64)
def test_solving_is_a_function_of_its_arguments_only(budget):
    assert solve(budget, 64, 8, V15) == solve(budget, 64, 8, V15)
    assert solve(budget, 64, 8, PLUS, recycle=0.0).merged == (0,) * len(solve(budget, 64, 8, PLUS, recycle=0.0).merged)
