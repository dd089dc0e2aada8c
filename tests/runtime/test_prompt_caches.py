"""Caches of a pruned prompt that are copied, cropped and used again."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from tests.tiny import EARLY_DROP, GENERATE, inputs, llava, logits, same

LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
METHODS = {
    "sparsevlm": lambda **o: sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, **o),
    "plus": lambda **o: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP, **o),
    "random": lambda **o: sparsevlm.build("random", budget=9),
}
CASES = [*product(["sparsevlm", "plus"], EARLY_DROP), ("random", {})]


def prompt_cache(model, x: dict) -> DynamicCache:
    cache = DynamicCache()
    positions = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**x, past_key_values=cache, position_ids=positions)
    return cache


def longer(x: dict, seed: int) -> dict:
    """The prompt followed by four more words, without the pictures: the cache holds them."""
    torch.manual_seed(seed)
    batch = len(x["input_ids"])
    ids = torch.cat([x["input_ids"], torch.randint(3, 90, (batch, 4))], 1)
    return {"input_ids": ids, "attention_mask": torch.cat([x["attention_mask"], torch.ones(batch, 4).long()], 1)}


@pytest.mark.parametrize("layout", ["one", "batch"])
@pytest.mark.parametrize("name,options", CASES)
def test_one_prompt_many_continuations(name, options, layout):
    model = llava()
    x, _ = inputs(layout, model)
    with METHODS[name](**options)(model):
        cache = prompt_cache(model, x)
        outs = [
            model.generate(**longer(x, seed), past_key_values=copy.deepcopy(cache), **GENERATE) for seed in (4, 5, 4)
        ]
        fresh = model.generate(**longer(x, 4), past_key_values=prompt_cache(model, x), **GENERATE)
    assert torch.equal(logits(outs[0]), logits(outs[2])) and not torch.equal(logits(outs[0]), logits(outs[1]))
    same(logits(outs[0]), logits(fresh))


@pytest.mark.parametrize("layout", ["one", "batch"])
@pytest.mark.parametrize("name,options", CASES)
@torch.no_grad()
def test_cropped_tokens_are_forgotten(name, options, layout):
    """As in assisted decoding: three tokens are tried, two are taken back."""
    model = llava()
    x, _ = inputs(layout, model)
    batch, length = x["input_ids"].shape
    with METHODS[name](**options)(model):

        def step(cache, tokens, at):
            mask = torch.cat([x["attention_mask"], torch.ones(batch, at + tokens.shape[1]).long()], 1)
            positions = (mask.cumsum(1) - 1)[:, -tokens.shape[1] :]
            return model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[
                :, -1
            ]

        torch.manual_seed(3)
        words = torch.randint(3, 90, (batch, 3))
        other = torch.randint(3, 90, (batch, 1))
        tried = prompt_cache(model, x)
        step(tried, words, 0)
        tried.crop(-2)
        straight = prompt_cache(model, x)
        step(straight, words[:, :1], 0)
        same(step(tried, other, 1), step(straight, other, 1))
