"""Attention rows, scores, ranking, rank, packing and the RoPE kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.packing import pack, take
from sparsevlm.core.rank import attention_rank
from sparsevlm.core.rope_kernel import first_nonpositive_distance, rope_kernel
from sparsevlm.core.scores import attention_rows, causal_bias, mean_scores, rank_by_score, shares_of_rows


def full_attention(query, key, scaling, key_mask, window):
    """Softmax of the whole causal attention of one sequence: [H, S, S] for query [H, S, d]."""
    heads, length = query.shape[0], query.shape[1]
    key = key.repeat_interleave(heads // key.shape[0], 0)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        allowed &= torch.ones(length, length, dtype=torch.bool).triu(1 - window)
    if key_mask is not None:
        allowed &= key_mask | torch.eye(length, dtype=torch.bool)
    return (query @ key.transpose(1, 2) * scaling).masked_fill(~allowed, float("-inf")).softmax(-1)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.integers(1, 12), st.booleans(), st.sampled_from([None, 3, 7])
)
def test_rows_are_the_last_rows_of_the_full_attention(seed, kv_heads, rows, padded, window):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 12, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, kv_heads, 12, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(12) >= torch.tensor([[0], [12 - rows]]) if padded else None  # left padding
    bias = causal_bias(rows, 15, torch.float64, key.device, window)[:, -12:]  # made for a longer sequence
    got = attention_rows(query[:, :, -rows:], key, 0.3, mask, bias)
    if window is None:
        assert torch.equal(got, attention_rows(query[:, :, -rows:], key, 0.3, mask))
    for b in range(2):
        want = full_attention(query[b], key[b], 0.3, None if mask is None else mask[b], window)[:, -rows:]
        torch.testing.assert_close(got[b], want, rtol=1e-12, atol=1e-12)


def test_rows_of_padding_are_finite():
    mask = torch.zeros(1, 6, dtype=torch.bool)
    rows = attention_rows(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), 0.3, mask)
    assert rows.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_softmaxed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 8, generator=generator).to(dtype) for n in (3, 600))
    rows = attention_rows(query, key, 0.35)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, attention_rows(query.float(), key.float(), 0.35), rtol=0, atol=0)


def test_scores_are_means_over_heads_and_raters():
    rows = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    weights = torch.tensor([[0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1.0]], dtype=torch.float64)
    got = mean_scores(rows, weights)
    torch.testing.assert_close(got[0], rows[0][:, [1, 2]].mean((0, 1)))
    torch.testing.assert_close(got[1], rows[1][:, 4].mean(0))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_ranking_breaks_ties_by_index(values, data):
    valid = [data.draw(st.booleans()) for _ in values]
    order = rank_by_score(torch.tensor([values]).float())[0].tolist()
    assert order == sorted(range(len(values)), key=lambda i: (-values[i], i))
    order = rank_by_score(torch.tensor([values]).float(), torch.tensor([valid]))[0].tolist()
    assert order == sorted(range(len(values)), key=lambda i: (not valid[i], -values[i] if valid[i] else 0, i))


def test_negative_scores_stay_above_invalid_entries():
    order = rank_by_score(torch.tensor([[-5.0, 1.0, -7.0]]), torch.tensor([[True, False, True]]))
    assert order.tolist() == [[0, 2, 1]]


def test_rank_in_a_batch_is_the_rank_alone():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 6, 40, generator=generator)
    attention[1, 3] = attention[1, 2] * 2  # one rater less
    attention[2, :, 3:] = 1e9  # invalid columns must not raise the tolerance
    raters = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[2, 3:] = False
    assert attention_rank(attention, raters, valid) == [3, 4, 3]
    for b in range(3):
        p = attention[b][raters[b]][:, valid[b]]
        assert attention_rank(p[None], torch.ones(1, len(p), dtype=torch.bool)) == [torch.linalg.matrix_rank(p)]
    assert attention_rank(attention[:1], raters[:1]) == [3]
    assert attention_rank(attention[:1], raters[:1] & False) == [0]


def tables(positions: torch.Tensor, width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [B, N, width] as Llama makes them."""
    angle = positions[..., None].double() * theta ** (-torch.arange(0, width, 2).double() / width)
    return tuple(f(torch.cat([angle, angle], -1)).float() for f in (torch.cos, torch.sin))


@pytest.mark.parametrize("width,theta", [(8, 1e4), (64, 1e4), (128, 1e6)])
def test_kernel_against_its_formula(width, theta):
    query, key = torch.tensor([[30, 31, 80]]), torch.tensor([[0, 5, 17, 29]])
    got = rope_kernel(tables(query, width, theta), tables(key, width, theta))
    for i, m in enumerate(query[0].tolist()):
        for j, n in enumerate(key[0].tolist()):
            cosines = [math.cos((m - n) * theta ** (-2 * k / width)) for k in range(width // 2)]
            assert got[0, i, j].item() == pytest.approx(2 / math.sqrt(width) * sum(cosines), abs=2e-4)


def inv_freq(width: int, theta: float) -> torch.Tensor:
    return theta ** (-torch.arange(0, width, 2) / width)


def test_where_the_kernel_falls_to_zero():
    assert first_nonpositive_distance(inv_freq(128, 1e4), 16384) == 1707  # LLaVA-1.5: Vicuna's head size and theta
    assert first_nonpositive_distance(inv_freq(128, 1e4), 1707) is None
    assert first_nonpositive_distance(inv_freq(128, 1e6), 3000) is None
    assert first_nonpositive_distance(torch.tensor([1.0]), 10) == 2  # cos(2) < 0 < cos(1)


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 3))
def test_pack(rows, more):
    mask = torch.tensor(rows)
    width = min(9, int(mask.sum(1).max()) + more)
    index = pack(mask, width)
    real = mask.gather(1, index)
    for b, row in enumerate(rows):
        true = [i for i, v in enumerate(row) if v]
        assert index[b][real[b]].tolist() == true
        assert len(set(index[b].tolist())) == width
        assert not mask[b][index[b][~real[b]]].any()


def test_take():
    x = torch.randn(2, 5, 3, 2)
    index = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(take(x, index), torch.stack([x[0][index[0]], x[1][index[1]]]))
    assert torch.equal(take(x[:1], index), torch.stack([x[0][index[0]], x[0][index[1]]]))
    assert torch.equal(take(x[..., 0, 0], index), torch.stack([x[0, :, 0, 0][index[0]], x[1, :, 0, 0][index[1]]]))


def test_shares_of_rows_give_a_loud_word_no_more_say_than_a_quiet_one():
    colon, name = [0.6, 0.2, 0.0], [0.0, 0.01, 0.03]  # paid to three visual tokens; the colon pays twenty times as much
    rows, weights = torch.tensor([[[colon, name]]]), torch.full((1, 2), 0.5)
    found = shares_of_rows(rows, weights)[0].tolist()
    assert found == pytest.approx([0.75 / 2, (0.25 + 0.25) / 2, 0.75 / 2])
    assert rows.mean(1).mean(1).argmax() == 0  # the plain mean is the colon's choice
    assert shares_of_rows(rows * torch.tensor([7.0, 0.1])[:, None], weights)[0].tolist() == pytest.approx(found)
    # heads are averaged first; a token that is not there takes no part; a row of nothing adds nothing
    two = torch.stack([rows[:, 0], 3 * rows[:, 0].flip(1)], 1)
    assert torch.allclose(shares_of_rows(two, weights), shares_of_rows(two.mean(1, keepdim=True), weights))
    valid = torch.tensor([[True, True, False]])
    assert shares_of_rows(rows, weights, valid)[0].tolist() == pytest.approx([0.75 / 2, 0.25 / 2 + 0.5, 0])
    rows[0, 0, 0] = 0
    assert shares_of_rows(rows, weights)[0].tolist() == pytest.approx([0, 0.125, 0.375])
