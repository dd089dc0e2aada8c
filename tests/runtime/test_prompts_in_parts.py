"""A prompt that is prefilled in chunks is pruned as a whole, or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from tests.tiny import GENERATE, IMAGE, inputs, llava, logits, prompt, same

METHODS = {
    "sparsevlm": lambda: sparsevlm.build("sparsevlm", layers=(1, 3, 5), keep=(18, 10, 5)),
    "plus": lambda: sparsevlm.build("sparsevlm_plus", layers=(1, 3, 5), keep=(18, 10, 5)),
    "random": lambda: sparsevlm.build("random", budget=9),
    "divprune": lambda: sparsevlm.build("divprune", budget=9),
    "none": lambda: sparsevlm.build("none"),
}


EVERY_CHUNK = [(name, layout, n) for name, layout in [*((m, "batch") for m in METHODS), ("sparsevlm", "multi")]
               for n in (1, 16, 45, 1000)]  # fmt: skip
QUICK_CHUNKS = [c for c in EVERY_CHUNK if c[2] == 16 or c[:2] == ("sparsevlm", "batch")]


@pytest.mark.parametrize(
    "name,layout,chunk", [c if c in QUICK_CHUNKS else pytest.param(*c, marks=pytest.mark.slow) for c in EVERY_CHUNK]
)
def test_chunked_prefill_is_one_prefill(name, layout, chunk):
    model = llava()
    x, _ = inputs(layout, model)
    with METHODS[name]()(model) as trace:
        want = model.generate(**x, **GENERATE)
        with pytest.warns(UserWarning, match=f"prefill_chunk_size={chunk} is ignored for prompts that are pruned"):
            out = model.generate(**x, **GENERATE, prefill_chunk_size=chunk)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            model.generation_config.prefill_chunk_size = chunk
            again = model.generate(**x, **GENERATE)
    assert torch.equal(logits(out), logits(want)) and torch.equal(logits(again), logits(want))
    assert model.generation_config.prefill_chunk_size == chunk
    first, *rest = trace.prefills
    assert len(rest) == 2 and all(r.leaving == first.leaving and r.n_visual == first.n_visual for r in rest)
    plain = model.generate(**x, **GENERATE)
    model.generation_config.prefill_chunk_size = None
    same(logits(plain), logits(model.generate(**x, **GENERATE)))  # outside the block chunks are back, and exact


@pytest.mark.parametrize("name", METHODS)
def test_text_in_chunks(name):
    """Where nothing is pruned it is left to transformers, also in a second turn on a pruned cache."""
    model = llava()
    x, _ = inputs("batch", model)
    words = {"input_ids": torch.randint(3, 90, (2, 30))}
    torch.manual_seed(9)
    turn = torch.randint(3, 90, (3, 11))
    calls = []
    with METHODS[name]()(model):

        def second(**options):
            first = model.generate(**x, **GENERATE)
            ids = torch.cat([first.sequences, turn], 1)
            mask = torch.cat([x["attention_mask"], torch.ones_like(ids[:, x["input_ids"].shape[1] :])], 1)
            cache = first.past_key_values
            return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GENERATE, **options)

        want, talk = second(), model.generate(**words, **GENERATE)
        handle = model.model.register_forward_pre_hook(
            lambda m, a, k: calls.append(k["input_ids"].shape[1]), with_kwargs=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(logits(model.generate(**words, **GENERATE, prefill_chunk_size=8)), logits(talk))
            assert calls[:4] == [8, 8, 8, 6]
            same(logits(second(prefill_chunk_size=4)), logits(want))
        handle.remove()
    assert calls[-8:] == [4, 4, 4, 1, 1, 1, 1, 1]


def parts(model, x: dict, cuts: list[int]) -> list[dict]:
    """The prompt cut at the given places; each part brings the features of its own image tokens."""
    features = torch.cat(list(model.model.get_image_features(x["pixel_values"]).pooler_output))
    out, ids = [], x["input_ids"]
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = ids[:, first:last]
        own = int((ids[:, :first] == IMAGE).sum())
        n = int((part == IMAGE).sum())
        kwargs = {"input_ids": part}
        if n:
            pooled = type("Features", (), {"pooler_output": [features[own : own + n]]})
            kwargs["mm_encoder_outputs"] = {"image": pooled}
        out.append(kwargs)
    return out


@pytest.mark.parametrize("name", ["sparsevlm", "plus", "random", "none"])
@torch.no_grad()
def test_a_loop_of_the_users_own(name):
    model = llava()
    x, _ = inputs("one", model)  # 5 words, 36 visual tokens, 9 words
    with METHODS[name]()(model) as trace:
        want = model(**x).logits[:, -1]

        def loop(cuts):
            cache = DynamicCache()
            for kwargs in parts(model, x, cuts):
                out = model(**kwargs, past_key_values=cache)
            return out.logits[:, -1]

        same(loop([3]), want)  # words before the image
        same(loop([5]), want)
        for cuts in ([41], [20], [40], [16, 32]):  # between image and text, or through the image
            if name == "none":
                same(loop(cuts), want)
                continue
            with pytest.raises(
                ValueError, match="last call ended with an image.*images and the text after them in one"
            ):
                loop(cuts)
        trace.clear()
        same(model(**x).logits[:, -1], want)
        assert len(trace.prefills) == 1


@torch.no_grad()
def test_one_cached_image_and_many_questions():
    """Exact for what decides without looking at the question."""
    model = llava()
    x, _ = inputs("one", model)
    with METHODS["divprune"]()(model):
        want = model(**x).logits[:, -1]
        cache = model(input_ids=x["input_ids"][:, :41], pixel_values=x["pixel_values"]).past_key_values
        mask = torch.ones_like(x["input_ids"])
        positions = torch.arange(41, mask.shape[1])[None]
        for _ in range(2):
            again = copy.deepcopy(cache)
            out = model(input_ids=x["input_ids"][:, 41:], past_key_values=again, position_ids=positions)
            same(out.logits[:, -1], want)


@torch.no_grad()
def test_an_image_without_text_is_answered():
    """It stays whole; what is generated after it, also several tokens at a time, is no rest of the prompt."""
    model = llava()
    torch.manual_seed(0)
    x = {"input_ids": torch.tensor([prompt([5, "I"])]), "pixel_values": torch.randn(1, 3, 42, 42, dtype=model.dtype)}
    plain = model.generate(**x, **GENERATE)
    with METHODS["sparsevlm"]()(model):
        out = model.generate(**x, **GENERATE)
        assert torch.equal(logits(plain), logits(out))
        options = {key: value for key, value in GENERATE.items() if key != "output_logits"}
        looked_up = model.generate(**x, **options, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up.sequences, plain.sequences)
        ids = torch.cat([out.sequences, torch.randint(3, 90, (1, 4))], 1)
        second = model.generate(input_ids=ids, past_key_values=out.past_key_values, **GENERATE)
    first = model.generate(**x, **GENERATE)
    same(logits(second), logits(model.generate(input_ids=ids, past_key_values=first.past_key_values, **GENERATE)))
