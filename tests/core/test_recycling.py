"""Recycling: counts, clustering against a restatement in plain loops, merging."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.recycling import density_peaks, merge_weights, recycled_counts


def test_counts_are_the_authors():
    for n in range(1, 3001):
        m = int(n * 0.3) + 1
        assert recycled_counts(n) == (m, int(m / 10) + 1)


@pytest.mark.parametrize(
    "n,share,cluster,want", [(0, 0.3, 0.1, (0, 0)), (50, 0.0, 0.1, (0, 0)), (-1, 0.3, 0.1, (0, 0))]
)
def test_nothing_to_recycle(n, share, cluster, want):
    assert recycled_counts(n, share, cluster) == want


@given(st.integers(1, 4000), st.floats(0.01, 1), st.floats(0, 1))
def test_counts_stay_within_what_is_there(n, share, cluster):
    pool, merged = recycled_counts(n, share, cluster)
    assert 1 <= merged <= pool <= n


def naive_density_peaks(points: list[list[float]], k: int) -> tuple[list[int], list[int]]:
    """Density-peak clustering of one sample, written out: lower index first wherever something ties."""
    m, width = len(points), len(points[0])
    d = [
        [math.sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True))) / math.sqrt(width) for q in points]
        for p in points
    ]
    density = [math.exp(-sum(x * x for x in sorted(row)[:k]) / k) for row in d]
    largest = max(max(row) for row in d)
    separation = [min([d[i][j] for j in range(m) if density[j] > density[i]], default=largest) for i in range(m)]
    peak = [s * rho for s, rho in zip(separation, density, strict=True)]
    centres = sorted(range(m), key=lambda i: -peak[i])[:k]
    group = [min(range(k), key=lambda c: d[centres[c]][i]) for i in range(m)]
    for c, i in enumerate(centres):
        group[i] = c
    return centres, group


def draw(seed: int, m: int, ties: bool) -> torch.Tensor:
    """[m, 4] points; with `ties` on a line and on a grid: equal distances, densities and doubles abound.

    These are float32: ties need hold in the precision of a model only.
    """
    generator = torch.Generator().manual_seed(seed)
    if not ties:
        return torch.randn(m, 4, generator=generator, dtype=torch.float64)
    points = torch.zeros(m, 4)
    points[:, 0] = torch.randint(-6, 7, (m,), generator=generator) / 2
    return points


def run(points: torch.Tensor, k: int) -> tuple[list[int], list[int]]:
    centres, group = density_peaks(points[None], torch.tensor([k]), k)
    return centres[0].tolist(), group[0].tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 24), st.booleans(), st.data())
def test_against_plain_loops(seed, m, ties, data):
    points = draw(seed, m, ties)
    k = data.draw(st.integers(1, m))
    assert run(points, k) == naive_density_peaks(points.tolist(), k)


def test_two_clusters_tie_systematically_and_go_by_index():
    """k = 2: the densities of mutual neighbours are equal. The densest pair gives both centres, lower index first."""
    points = torch.tensor([[9.0, 9.0], [0.0, 0.0], [5.0, 5.0], [0.1, 0.0]], dtype=torch.float64)
    assert run(points, 2)[0] == [1, 3]
    assert run(points[[3, 0, 2, 1]], 2)[0] == [0, 3]


def test_one_cluster_takes_the_first_token_as_centre():
    assert run(draw(0, 9, False), 1) == ([0], [0] * 9)


def test_a_centre_stays_its_own_beside_its_double():
    points = torch.zeros(3, 2, dtype=torch.float64)
    centres, group = run(points, 3)
    assert centres == [0, 1, 2] and group == [0, 1, 2]


def test_self_distance_is_exactly_zero_in_float32():
    """Distances by matrix multiplication are not zero between equal points far from the origin."""
    points = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) + 300
    points = torch.cat([points, points[:1]])
    centres, group = run(points, 2)
    assert set(centres) == {0, 40}  # the only two tokens with a neighbour at distance zero


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.booleans(), st.lists(st.integers(1, 20), min_size=2, max_size=4), st.data())
def test_a_ragged_batch_equals_its_samples_alone(seed, ties, sizes, data):
    width = max(sizes)
    clusters = [data.draw(st.integers(1, m)) for m in sizes]
    points = torch.stack([draw(seed + b, width, ties) * 0 + 7 for b in range(len(sizes))])  # rubbish beyond each size
    for b, m in enumerate(sizes):
        points[b, :m] = draw(seed + b, m, ties)
    valid = torch.arange(width) < torch.tensor(sizes)[:, None]
    centres, group = density_peaks(points, torch.tensor(clusters), max(clusters), valid)
    weights = merge_weights(group, max(clusters), valid, dtype=torch.float64)
    for b, (m, k) in enumerate(zip(sizes, clusters, strict=True)):
        alone_centres, alone_group = run(points[b, :m], k)
        assert centres[b, :k].tolist() == alone_centres and group[b, :m].tolist() == alone_group
        assert len(set(centres[b].tolist())) == max(clusters)
        alone = merge_weights(torch.tensor([alone_group]), k, dtype=torch.float64)[0]
        torch.testing.assert_close(weights[b, :k, :m], alone, rtol=0, atol=0)
        assert (weights[b, k:] == 0).all() and (weights[b, :, m:] == 0).all()


def test_merging():
    group = torch.tensor([[0, 1, 0, 0, 1]])
    tokens = torch.arange(10, dtype=torch.float64).view(1, 5, 2)
    mean = merge_weights(group, 2, dtype=torch.float64) @ tokens
    total = merge_weights(group, 2, how="sum", dtype=torch.float64) @ tokens
    torch.testing.assert_close(total[0], torch.stack([tokens[0, [0, 2, 3]].sum(0), tokens[0, [1, 4]].sum(0)]))
    # the authors divide by count + 1e-6
    torch.testing.assert_close(mean[0], total[0] / torch.tensor([[3 + 1e-6], [2 + 1e-6]], dtype=torch.float64))
    with pytest.raises(ValueError, match="unknown merge 'median'. Use mean or sum"):
        merge_weights(group, 2, how="median")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clustered_in_float32(dtype):
    points = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    k = torch.tensor([4])
    for a, b in zip(density_peaks(points, k, 4), density_peaks(points.float(), k, 4), strict=True):
        assert torch.equal(a, b)
