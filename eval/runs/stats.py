"""Intervals by the bootstrap: for one run, and for the difference between two runs on the same samples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

DRAWS = 10_000
_CHUNK = 4_000_000  # indices drawn at once, so that memory stays flat whatever the number of samples


def bootstrap_means(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means of `draws` resamples of `values` with replacement, float64 [draws].

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"the bootstrap needs a list of numbers, not an array of shape {x.shape}")
    if len(x) == 1:  # scipy refuses it; every resample is the value
        return np.repeat(x, draws)
    from scipy.stats import bootstrap

    batch = max(1, _CHUNK // len(x))
    found = bootstrap((x,), np.mean, n_resamples=draws, batch=batch, method="percentile", rng=seed)
    return found.bootstrap_distribution


def bootstrap_ci(
    values: Sequence[float], draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the samples with its percentile bootstrap interval.

    Args:
        values: one score per sample.
        draws: resamples.
        seed: of the resampling; the same values and seed give the same interval.
        level: coverage, 0.95 = 2.5 % are cut off on either side.

    Returns:
        (mean, low, high) in the unit of the values.
    """
    low, high = np.quantile(bootstrap_means(values, draws, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(values)), float(low), float(high)


def paired_difference(
    a: Mapping[Hashable, float],
    b: Mapping[Hashable, float],
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of a - b over the samples that both have, with its paired bootstrap interval.

    The same samples are resampled on both sides, so that what makes a sample hard for both cancels out.

    Args:
        a, b: document id -> score.

    Returns:
        (mean, low, high) of the difference, in the unit of the scores.

    Raises:
        ValueError: no document is in both.
    """
    common = [key for key in a if key in b]
    if not common:
        raise ValueError("the two runs have no document in common, so their difference has no paired interval")
    return bootstrap_ci([a[key] - b[key] for key in common], draws, seed, level)
