"""What a mask says, in a later call, of tokens that a pruned cache holds; and caches whose rows are chosen anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import pad as extend
from transformers import DynamicCache, StaticCache

import sparsevlm
from tests.tiny import GENERATE, inputs, llava, logits, same

METHODS = {
    "sparsevlm": lambda: sparsevlm.build("sparsevlm", layers=(1, 3, 5), keep=(18, 10, 5)),
    "plus": lambda: sparsevlm.build("sparsevlm_plus", layers=(1, 3, 5), keep=(18, 10, 5)),
    "divprune": lambda: sparsevlm.build("divprune", budget=9),
}
OTHER = "says something else of earlier tokens than when this cache was pruned"


def begin(model, x: dict, cache=None):
    positions = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**x, position_ids=positions, past_key_values=cache or DynamicCache()).past_key_values


def step(model, cache, tokens, mask) -> torch.Tensor:
    """Logits of the last token of a call with these new tokens, `mask` being that of all."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("layout", ["one", "batch"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_prompt_tokens_that_are_hidden_later(name, layout):
    model = llava()
    x, _ = inputs(layout, model)
    mask, batch = x["attention_mask"], len(x["input_ids"])
    hidden = mask.clone()
    hidden[:, 4] = 1 - hidden[:, 4]  # a word before the image; the padding of one row
    with METHODS[name]()(model):
        cache = begin(model, x)
        want = step(model, copy.deepcopy(cache), torch.full((batch, 1), 7), extend(mask, (0, 1), value=1))
        held = [layer.get_seq_length() for layer in cache.layers]
        for n in (1, 3):
            with pytest.raises(ValueError, match=OTHER):
                step(model, cache, torch.full((batch, n), 7), extend(hidden, (0, n), value=1))
        words = {"input_ids": torch.cat([x["input_ids"], torch.full((batch, 2), 7)], 1)}
        with pytest.raises(ValueError, match=OTHER):
            later = extend(hidden, (0, 2), value=1)
            model.generate(**words, attention_mask=later, past_key_values=cache, **GENERATE)
        with pytest.raises(ValueError, match=OTHER):
            model(**x | {"attention_mask": torch.cat([hidden, mask], 1)}, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == held
        same(step(model, cache, torch.full((batch, 1), 7), extend(mask, (0, 1), value=1)), want)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_padded_cache_needs_its_mask(name):
    model = llava()
    x, _ = inputs("batch", model)
    with METHODS[name]()(model):
        cache = begin(model, x)
        with pytest.raises(ValueError, match="this cache holds padding, and the call does not say where"):
            model(input_ids=torch.full((3, 1), 7), past_key_values=cache)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_words_that_are_hidden_were_never_said(name, kind):
    """Hidden as they come, one by one or together, or afterwards, as the padding behind a short answer is."""
    model = llava()
    x, _ = inputs("batch", model)
    mask = x["attention_mask"]
    said, question = torch.randint(3, 90, (3, 2)), torch.randint(3, 90, (3, 3))
    shown, hidden = extend(mask, (0, 2), value=1), extend(mask, (0, 2), value=0)

    def new():
        room = {"config": model.config.text_config, "max_cache_len": 80} if kind is StaticCache else {}
        return begin(model, x, kind(**room))

    def told(cache, first, later):
        """The words together."""
        step(model, cache, said, first)
        return step(model, cache, question, extend(later, (0, 3), value=1))

    def one_by_one(cache, first, later):
        for t in (1, 2):
            step(model, cache, said[:, t - 1 : t], first[:, : mask.shape[1] + t])
        return torch.stack(
            [step(model, cache, question[:, t - 1 : t], extend(later, (0, t), value=1)) for t in (1, 2, 3)]
        )[-1]

    def next_turn(cache, first, later):
        step(model, cache, said, first)
        ids = torch.cat([x["input_ids"], said, question], 1)
        later = extend(later, (0, 3), value=1)
        out = model.generate(input_ids=ids, attention_mask=later, past_key_values=cache, **GENERATE)
        return logits(out)[:, 0].to(model.dtype)

    with METHODS[name]()(model):
        want = step(model, new(), question, extend(mask, (0, 3), value=1))
        for way in (told, one_by_one, next_turn):
            if way is next_turn and kind is StaticCache:
                continue
            for first in (shown, hidden):
                tolerance = 1e-5 if way is next_turn else None  # generate() hands out float32
                same(way(new(), first, hidden), want, tolerance)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_second_image_after_words_that_are_hidden(name):
    model = llava()
    x, _ = inputs("batch", model)
    again, _ = inputs("one", model, seed=5)
    ids, pixels = again["input_ids"].expand(3, -1), again["pixel_values"].expand(3, -1, -1, -1)
    said = torch.randint(3, 90, (3, 2))

    def turn(cache, mask):
        mask = extend(mask, (0, ids.shape[1]), value=1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        first = model(input_ids=ids, pixel_values=pixels, **call).logits[:, -1]
        return torch.stack([first, step(model, cache, said[:, :1], extend(mask, (0, 1), value=1))])

    with METHODS[name]()(model):
        want = turn(begin(model, x), x["attention_mask"])
        cache = begin(model, x)
        step(model, cache, said, extend(x["attention_mask"], (0, 2), value=1))
        same(turn(cache, extend(x["attention_mask"], (0, 2), value=0)), want)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_repeated(name):
    """As by beam search, or by a loop that lets finished prompts go: what is known of a row goes with it."""
    model = llava()
    x, _ = inputs("ragged" if name != "divprune" else "batch", model)
    words = torch.randint(3, 90, (3, 1))
    mask = extend(x["attention_mask"], (0, 1), value=1)
    with METHODS[name]()(model):
        cache = begin(model, x)
        want = step(model, copy.deepcopy(cache), words, mask)
        for choose, rows in (
            (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
            (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ):
            other = copy.deepcopy(cache)
            choose(other)
            same(step(model, other, words[rows], mask[rows]), want[rows])
        with pytest.raises(ValueError, match=OTHER):
            step(model, other, words[rows], mask[[0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_cache_that_was_reset_begins_with_one_token(name):
    model = llava()
    x, _ = inputs("one", model)
    token = torch.tensor([[7]])
    plain = DynamicCache()
    want = [model(input_ids=token, past_key_values=plain).logits for _ in range(2)]
    with METHODS[name]()(model):
        cache = begin(model, x)
        cache.reset()
        got = [model(input_ids=token, past_key_values=cache).logits for _ in range(2)]
    same(torch.stack(got), torch.stack(want))
