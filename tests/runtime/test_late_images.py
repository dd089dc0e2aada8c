"""A conversation whose first turn brings no image: nothing is pruned until there is one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from tests.tiny import EARLY_DROP, GENERATE, inputs, llava, logits, pad, prompt, same

LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
METHODS = {
    "sparsevlm": lambda **o: sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, **o),
    "original": lambda **o: sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, positions="original", **o),
    "plus": lambda **o: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP, **o),
    "rank": lambda **o: sparsevlm.build("sparsevlm_rank", layers=LAYERS, lam=0.9, **o),
    "random": lambda **o: sparsevlm.build("random", budget=9),
}
CASES = [*product(["sparsevlm", "original", "plus", "rank"], EARLY_DROP), ("random", {})]


def chat(model, ids, mask, turn, pixels):
    first = model.generate(input_ids=ids, attention_mask=mask, **GENERATE)
    answered = torch.cat([first.sequences, turn], 1)
    more = mask.new_ones(len(ids), answered.shape[1] - ids.shape[1])
    return model.generate(
        input_ids=answered[:, -turn.shape[1] - 1 :],
        attention_mask=torch.cat([mask, more], 1),
        pixel_values=pixels,
        past_key_values=first.past_key_values,
        **GENERATE,
    )


@pytest.mark.parametrize("name,options", CASES)
def test_padded_text_first_then_images_batch_equals_singles(name, options):
    model = llava()
    torch.manual_seed(4)
    rows = [prompt([8]), prompt([3]), prompt([12])]
    ids, mask = pad(rows)
    turn = torch.tensor([prompt([3, "I", 6]) for _ in rows])
    pixels = torch.randn(3, 3, 42, 42, dtype=model.dtype)
    with METHODS[name](**options)(model) as trace:
        together = chat(model, ids, mask, turn, pixels)
        assert len(trace.prefills) == 1 and trace.prefills[0].leaving[0] < 36
        for b, row in enumerate(rows):
            one = torch.tensor([row])
            alone = chat(model, one, torch.ones_like(one), turn[b : b + 1], pixels[b : b + 1])
            same(logits(together)[b], logits(alone)[0])


@pytest.mark.parametrize("name,options", [case for case in CASES if case[0] != "random"])
@torch.no_grad()
def test_words_in_an_earlier_call_equal_the_prompt_in_one(name, options):
    """They lie before the image, so nothing is decided otherwise: each survivor has the place it has in one call."""
    model = llava()
    x, _ = inputs("one", model)
    with METHODS[name](**options)(model) as trace:
        want = model(**x).logits[:, -1]
        cache = DynamicCache()
        model(input_ids=x["input_ids"][:, :3], past_key_values=cache)
        rest = model(input_ids=x["input_ids"][:, 3:], pixel_values=x["pixel_values"], past_key_values=cache)
    whole, late = trace.prefills
    for a, b in zip(whole.stages, late.stages, strict=True):
        assert torch.equal(a.kept[0], b.kept[0])
    same(rest.logits[:, -1], want)
