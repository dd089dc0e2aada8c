"""Caches of a pruned prompt that are copied, cropped and used again."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparsevlm
from tests.tiny import EARLY_DROP, GENERATE, inputs, llava, logits, same

LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
METHODS = {
    "sparsevlm": lambda **o: sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, **o),
    "plus": lambda **o: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP, **o),
    "random": lambda **o: sparsevlm.build("random", budget=9),
    "divprune": lambda: sparsevlm.build("divprune", budget=9),
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


OTHERS = {  # what may not go on with a cache that `sparsevlm` has pruned
    "nothing": None,
    "none": lambda: sparsevlm.build("none"),
    "other method": lambda: sparsevlm.build("random", budget=9),
    "other options": lambda: sparsevlm.build("sparsevlm", layers=LAYERS, keep=(18, 10, 6)),
}


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["sparsevlm", "divprune"])
@torch.no_grad()
def test_a_pruned_cache_after_the_block(name, other, kind):
    model, stranger = llava(), llava(seed=3)
    x, _ = inputs("one", model)
    method = METHODS[name]()
    token, position = torch.tensor([[7]]), torch.tensor([[x["input_ids"].shape[1]]])
    with method(model):
        cache = new_cache(kind, model)
        model(**x, past_key_values=cache)
        copied = copy.deepcopy(cache)
        kept = copy.deepcopy(cache)
        want = model(input_ids=token, past_key_values=copy.deepcopy(cache), position_ids=position).logits
    block = (lambda m: OTHERS[other]()(m)) if OTHERS[other] else lambda m: nullcontext()
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    options = {**GENERATE, "max_new_tokens": 2}
    for network in (model, stranger):
        with block(network):
            for state in (cache, copied, pickle.loads(pickle.dumps(cache))):
                for call in (
                    lambda: network(input_ids=token, past_key_values=state, position_ids=position),  # noqa: B023
                    lambda: network(input_ids=token, past_key_values=state),  # noqa: B023
                    lambda: network(input_ids=token, attention_mask=torch.ones(1, 51), past_key_values=state),  # noqa: B023
                    lambda: network.generate(**longer(x, 4), past_key_values=state, **options),  # noqa: B023
                    lambda: network(**x, past_key_values=state),  # noqa: B023
                ):
                    with pytest.raises(
                        ValueError, match="this cache was pruned by .*Go on with it inside a `with` block of"
                    ):
                        call()
    assert [int(layer.get_seq_length()) for layer in cache.layers] == lengths
    with METHODS[name]()(model):  # another block of the same method
        for state in (cache, kept):
            same(model(input_ids=token, past_key_values=state, position_ids=position).logits, want)


def new_cache(kind, model):
    return DynamicCache() if kind is DynamicCache else StaticCache(config=model.config.text_config, max_cache_len=80)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ["sparsevlm", "divprune"])
def test_an_emptied_cache_is_a_cache_like_any_other(name, kind):
    model = llava()
    x, _ = inputs("one", model)
    plain = model(**x).logits
    with METHODS[name]()(model):
        cache = new_cache(kind, model)
        model(**x, past_key_values=cache)
    if kind is StaticCache:
        cache.reset()
    else:
        cache.crop(-cache.layers[0].get_seq_length())
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    same(model(**x, past_key_values=cache).logits, plain)
    step = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
    whole = model(**x | {"input_ids": torch.cat([x["input_ids"], torch.tensor([[7]])], 1), "attention_mask": None})
    same(step[:, -1], whole.logits[:, -1])


@torch.no_grad()
def test_a_cache_of_which_nothing_was_dropped_goes_on_anywhere():
    model = llava()
    x, _ = inputs("batch", model)
    token = torch.tensor([[7]] * 3)
    mask = torch.cat([x["attention_mask"], torch.ones(3, 1).long()], 1)
    with sparsevlm.build("sparsevlm", budget="full")(model):
        cache = model(**x).past_key_values
    plain = model(**x).past_key_values
    outs = [model(input_ids=token, attention_mask=mask, past_key_values=c).logits for c in (cache, plain)]
    same(*outs)


@torch.no_grad()
def test_a_cache_whose_prefill_failed():
    model = llava()
    x, _ = inputs("one", model)
    token = torch.tensor([[7]])

    def fail(*_):
        raise RuntimeError("by the test")

    with METHODS["sparsevlm"]()(model):
        cache = DynamicCache()
        handle = model.model.language_model.layers[6].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="by the test"):
            model(**x, past_key_values=cache)
        handle.remove()
        with pytest.raises(ValueError, match="a call failed while this cache was being pruned.*Use a new cache"):
            model(input_ids=token, past_key_values=cache)
    with pytest.raises(ValueError, match="a call failed while this cache was being pruned.*Use a new cache"):
        model(input_ids=token, past_key_values=cache)
