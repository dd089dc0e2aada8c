"""Where words point: against sums by hand."""

import math

import pytest
import torch

from sparsevlm.core.pointing import distributions, information, neighbourhood, pointed_at


def test_a_word_like_all_tokens_tells_nothing_and_one_like_a_single_token_nearly_everything():
    tokens = torch.eye(4)[None]
    words = torch.stack([torch.ones(4), 5 * torch.eye(4)[2]])[None]
    places = distributions(words, tokens, temperature=0.1)
    assert places[0, 0].tolist() == pytest.approx([0.25] * 4)
    rest = 1 / (math.exp(10) + 3)  # cosine 1 to the third token, 0 to the others
    assert places[0, 1].tolist() == pytest.approx([rest, rest, math.exp(10) * rest, rest], rel=1e-5)
    told = information(places)[0].tolist()
    assert told == pytest.approx([0, math.log(4) + 3 * rest * math.log(rest) + (1 - 3 * rest) * math.log(1 - 3 * rest)])
    assert 1.38 < told[1] < math.log(4)
    # the word that tells nothing has no say, whatever stands beside it
    assert pointed_at(places, information(places))[0].tolist() == pytest.approx((4 * places[0, 1]).tolist(), abs=1e-5)
    assert pointed_at(places, torch.ones(1, 2))[0].tolist() == pytest.approx((2 * places[0].sum(0)).tolist(), rel=1e-5)
    assert pointed_at(places, torch.zeros(1, 2)).tolist() == [[1, 1, 1, 1]]


def test_tokens_that_are_not_there_change_nothing():
    torch.manual_seed(0)
    words, tokens = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 7, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 5 + [False] * 2])
    some, alone = distributions(words, tokens, 0.2, valid), distributions(words, tokens[:, :5], 0.2)
    assert torch.allclose(some[..., :5], alone) and not some[..., 5:].any()
    assert torch.allclose(information(some, valid), information(alone))
    weights = torch.rand(1, 3, dtype=torch.float64)
    told = pointed_at(some, weights, valid)
    assert torch.allclose(told[:, :5], pointed_at(alone, weights)) and told.sum() == pytest.approx(5)


def test_blur_is_the_sum_over_neighbours_within_the_radius_and_never_crosses_into_another_picture():
    grid, radius, tokens = 5, 2, 26
    x = torch.zeros(1, 2 * tokens, dtype=torch.float64)
    x[0, 1 + 1 * grid + 3] = 3.0  # row 1, column 3 of the first picture
    x[0, 0] = 7.0  # its CLS token
    found = neighbourhood(x, tokens, grid, True, radius)[0]
    share = [math.exp(-((d * 1.5 / radius) ** 2) / 2) for d in range(radius + 1)]
    total = share[0] + 2 * sum(share[1:])
    for row in range(grid):
        for column in range(grid):
            down, across = abs(row - 1), abs(column - 3)
            want = 3 * share[down] * share[across] / total**2 if max(down, across) <= radius else 0
            assert found[1 + row * grid + column].item() == pytest.approx(want)
    assert found[0] == 0 and not found[tokens:].any()
    assert torch.equal(neighbourhood(x[:, 1:26], 25, grid, False, 0), x[:, 1:26])
