"""FlashAttention-2's contract, kept by a stand-in on the CPU.

FlashAttention takes a 2D padding mask or none, aligns the causal diagonal to the last key, and takes gaps in
position_ids of a single row for several sequences packed into one, which it then separates: silently wrong here.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import sparsevlm
from tests.tiny import GENERATE, inputs, llava, logits, same

LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
PLACES = list(product(["original", "renumber"], ["end", "centre"]))
calls: list[tuple] = []


def flash_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    batch, _, rows, _ = query.shape
    length = key.shape[2]
    if attention_mask is None:
        assert not _is_packed_sequence(kwargs.get("position_ids"), batch), "would be split into packed sequences"
    else:
        assert attention_mask.dim() == 2 and attention_mask.shape == (batch, length)
    calls.append((module.layer_idx, rows, length, attention_mask is not None))
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)[None, None]
    if kwargs.get("sliding_window") is not None:
        seen = seen & torch.ones(rows, length, dtype=torch.bool).triu(length - rows - kwargs["sliding_window"] + 1)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_stand_in", flash_attention)
AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)


def on_flash(model):
    model.model.language_model.config._attn_implementation = "flash_stand_in"
    calls.clear()
    return model


def check(model, method, x: dict) -> None:
    with method(model):
        want = model.generate(**x, **GENERATE)
        got = on_flash(model).generate(**x, **GENERATE)
    same(logits(want), logits(got), 1e-5)
    prefill = [length for layer, rows, length, _ in calls[:8]]
    assert prefill == sorted(prefill, reverse=True) and prefill[-1] < prefill[0]


@pytest.mark.parametrize("layout,place", list(product(["one", "batch", "ragged", "multi"], PLACES)))
def test_sparsevlm(layout, place):
    model = llava()
    x, _ = inputs(layout, model)
    options = {"layers": LAYERS, "keep": KEEP, "positions": place[0], "recycled_at": place[1]}
    check(model, sparsevlm.build("sparsevlm", **options), x)
    padded = layout in ("batch", "ragged")
    assert all(masked == padded for *_, masked in calls)


@pytest.mark.parametrize("layout", ["one", "batch"])
@pytest.mark.parametrize("name", ["plus", "random", "rank"])
def test_other_methods(name, layout):
    model = llava()
    x, _ = inputs(layout, model)
    method = {
        "plus": lambda: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP),
        "random": lambda: sparsevlm.build("random", budget=9),
        "rank": lambda: sparsevlm.build("sparsevlm_rank", layers=LAYERS, lam=0.9),
    }[name]()
    with method(model):
        want = model.generate(**x, **GENERATE)
        got = on_flash(model).generate(**x, **GENERATE)
    same(logits(want), logits(got), 1e-5)


@pytest.mark.parametrize("layout", ["one", "batch"])
def test_sliding_window(layout):
    model = llava("mistral", sliding_window=16)
    x, _ = inputs(layout, model)
    check(model, sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP), x)


def test_the_pitfall_is_real():
    """Gapped position_ids do look like packed sequences, to FlashAttention and to the mask functions."""
    gap = torch.tensor([[0, 1, 2, 7, 8]])
    assert _is_packed_sequence(gap, 1)
    config = llava().model.language_model.config
    mask = create_causal_mask(config, torch.zeros(1, 5, 64), None, None, position_ids=gap)
    assert not mask[0, 0, 4, 0]
