"""Choice of raters: each rule, masks, dtypes, and the fallback."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.core.raters import RULES, relevance, select_raters


def draw(seed, batch=3, visual=20, text=9, width=16):
    generator = torch.Generator().manual_seed(seed)
    # texts of different length, as in real prompts: otherwise the choice is close to a coin's
    amplitude = torch.rand(batch, text, 1, generator=generator) * 2
    v = torch.randn(batch, visual, width, generator=generator, dtype=torch.float64)
    return v, torch.randn(batch, text, width, generator=generator, dtype=torch.float64) * amplitude


def naive(visual, text) -> list[bool]:
    """The paper's rule for one sample in plain loops: mean over visual of a softmax over text, above its mean."""
    relevance = [0.0] * len(text)
    for v in visual:
        logits = [float(v @ t) for t in text]
        top = max(logits)
        exp = [2.718281828459045 ** (x - top) for x in logits]
        for i, e in enumerate(exp):
            relevance[i] += e / sum(exp) / len(visual)
    mean = sum(relevance) / len(relevance)
    return [r > mean for r in relevance]


@pytest.mark.parametrize("seed", range(5))
def test_paper_rule_against_a_naive_one(seed):
    visual, text = draw(seed)
    chosen = select_raters(visual, text)
    for b in range(3):
        assert chosen[b].tolist() == naive(visual[b], text[b])
    assert 0 < chosen.sum() < chosen.numel()


def test_dot_products_are_not_scaled():
    visual, text = draw(0, batch=20)
    assert not torch.equal(select_raters(visual, text), select_raters(visual, text / 4))  # 4 = sqrt(width)


def test_the_mean_must_be_exceeded():
    visual = torch.tensor([[[1.0, 0.0]]])
    shares = [0.5, 0.25, 0.125, 0.125]
    logits = torch.tensor(shares).log()
    assert logits.softmax(0).tolist() == shares  # exactly: the second is equal to the mean
    text = torch.stack([logits, torch.zeros(4)], 1)[None]
    assert select_raters(visual, text)[0].tolist() == [True, False, False, False]


def test_where_all_are_alike_all_rate():
    assert select_raters(torch.zeros(1, 3, 4), torch.randn(1, 5, 4)).all()


def test_centred_subtracts_the_mean_visual_token():
    visual, text = draw(1)
    offset = torch.randn(3, 1, 16, dtype=torch.float64) * 5
    assert torch.equal(
        select_raters(visual + offset, text, rule="centred"), select_raters(visual, text, rule="centred")
    )
    centred = visual - visual.mean(1, keepdim=True)
    assert torch.equal(select_raters(visual, text, rule="centred"), select_raters(centred, text))
    assert not torch.equal(select_raters(visual + offset, text), select_raters(visual, text))


def test_all_and_last():
    visual, text = draw(2)
    valid = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    assert torch.equal(select_raters(visual, text, text_valid=valid, rule="all"), valid)
    assert select_raters(visual, text, rule="all").all()
    assert select_raters(visual, text, text_valid=valid, rule="last").nonzero().tolist() == [[0, 5], [1, 8], [2, 0]]
    assert select_raters(visual, text, rule="last").nonzero().tolist() == [[0, 8], [1, 8], [2, 8]]


@pytest.mark.parametrize("count", [1, 3, 8, 9, 50])
def test_a_number_takes_the_most_relevant(count):
    visual, text = draw(5)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 4:] = False
    chosen = select_raters(visual, text, text_valid=valid, rule=count)
    for b, most in enumerate((9, 4, 9)):
        r = relevance(visual[b : b + 1], text[b : b + 1, :most])[0].tolist()
        best = sorted(range(most), key=lambda i: -r[i])[:count]
        assert chosen[b].nonzero()[:, 0].tolist() == sorted(best)


def test_the_papers_rule_takes_the_most_relevant_too():
    visual, text = draw(6, batch=8)
    by_rule = select_raters(visual, text)
    for b in range(8):
        one = slice(b, b + 1)
        assert torch.equal(by_rule[one], select_raters(visual[one], text[one], rule=int(by_rule[b].sum())))


def test_of_equals_a_number_takes_the_first():
    assert select_raters(torch.zeros(1, 3, 4), torch.randn(1, 5, 4), rule=2)[0].tolist() == [1, 1, 0, 0, 0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from((*RULES, 1, 3)), st.data())
def test_a_masked_batch_equals_its_samples_alone(seed, rule, data):
    visual, text = draw(seed)
    fewest = 3 if rule == "centred" else 1  # two centred tokens are opposite: two text tokens tie exactly
    sizes = [(data.draw(st.integers(fewest, 20)), data.draw(st.integers(1, 9))) for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    v_at = [torch.randperm(20, generator=generator)[:v].sort().values for v, _ in sizes]
    t_at = [torch.randperm(9, generator=generator)[:t].sort().values for _, t in sizes]
    v_valid, t_valid = torch.zeros(3, 20, dtype=torch.bool), torch.zeros(3, 9, dtype=torch.bool)
    for b in range(3):
        v_valid[b, v_at[b]], t_valid[b, t_at[b]] = True, True
    together = select_raters(visual, text, v_valid, t_valid, rule)
    assert not (together & ~t_valid).any() and together.any(1).all()
    for b in range(3):
        alone = select_raters(visual[b : b + 1, v_at[b]], text[b : b + 1, t_at[b]], rule=rule)
        assert torch.equal(together[b, t_at[b]], alone[0])


@pytest.mark.parametrize("rule", [*RULES, 1, 3])
def test_a_single_text_token_rates(rule):
    visual, text = draw(3, text=1)
    assert select_raters(visual, text, rule=rule).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """float16 overflows at 65504: dot products of these embeddings do not fit into it."""
    visual, text = draw(4)
    visual, text = (visual * 60).to(dtype), (text * 60).to(dtype)
    assert (visual.float() @ text.float().transpose(1, 2)).abs().max() > 65504
    assert torch.equal(select_raters(visual, text), select_raters(visual.float(), text.float()))


@pytest.mark.parametrize("rule", ["best", 0, -2, True, 2.5, None])
def test_unknown_rule(rule):
    with pytest.raises(ValueError, match=f"unknown rater rule {rule!r}. Use paper, all, centred, last, or a"):
        select_raters(*draw(0), rule=rule)
