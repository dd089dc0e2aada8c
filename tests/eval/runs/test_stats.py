import numpy as np
import pytest

from eval.runs import stats
from eval.runs.stats import bootstrap_ci, bootstrap_means, paired_difference


def test_interval_agrees_with_the_binomial():
    values = [1.0] * 300 + [0.0] * 100
    mean, low, high = bootstrap_ci(values)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    assert low == pytest.approx(0.75 - half, abs=0.004)
    assert high == pytest.approx(0.75 + half, abs=0.004)


def test_level_is_the_share_of_means_inside():
    values = np.random.default_rng(3).normal(size=50)
    means = bootstrap_means(values)
    for level in (0.5, 0.95):
        _, low, high = bootstrap_ci(values, level=level)
        assert np.mean((means >= low) & (means <= high)) == pytest.approx(level, abs=0.002)


def test_seeded_and_independent_of_how_draws_are_chunked(monkeypatch):
    values = np.random.default_rng(0).random(37)
    whole = bootstrap_means(values, draws=1000)
    assert np.array_equal(whole, bootstrap_means(values, draws=1000))
    assert not np.array_equal(whole, bootstrap_means(values, draws=1000, seed=1))
    monkeypatch.setattr(stats, "_CHUNK", 400)
    chunked = bootstrap_means(values, draws=1000)
    assert chunked.shape == whole.shape == (1000,)
    assert chunked == pytest.approx(whole)


@pytest.mark.parametrize("n", [1, 2, 50, 2000])
def test_resamples_are_those_of_numpys_generator(n):
    """The intervals of all results: the generator's seed and the order of its draws."""
    values = np.random.default_rng(1).standard_normal(n)
    drawn = np.random.default_rng(0).integers(0, n, (10_000, n))
    means = values[drawn].mean(1)
    assert np.array_equal(bootstrap_means(values), means)
    low, high = np.quantile(means, [0.025, 0.975])
    assert bootstrap_ci(values) == (values.mean(), low, high)


def test_no_values():
    with pytest.raises(ValueError, match="needs a list of numbers"):
        bootstrap_ci([])


def test_paired_difference_matches_documents_and_cancels_what_they_share():
    hard = np.random.default_rng(1).random(60)
    a = {i: h + 0.25 for i, h in enumerate(hard)}
    b = {i: hard[i] for i in reversed(range(60))} | {"only b": 9.0}
    assert paired_difference(a, b) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_difference(b, a) == pytest.approx((-0.25, -0.25, -0.25))


def test_paired_difference_of_unlike_runs_has_a_width():
    rng = np.random.default_rng(2)
    a, b = ({i: float(x) for i, x in enumerate(rng.random(200) < p)} for p in (0.8, 0.6))
    mean, low, high = paired_difference(a, b)
    assert low < mean < high
    assert mean == pytest.approx(np.mean(list(a.values())) - np.mean(list(b.values())))
    assert low > 0


def test_paired_difference_without_common_documents():
    with pytest.raises(ValueError, match="no document in common"):
        paired_difference({1: 1.0}, {2: 1.0})
