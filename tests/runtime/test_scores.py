"""Scores equal what the full softmax of eager attention gives, in every family, padded, windowed and on a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from sparsevlm.core.raters import RULES
from tests.tiny import EARLY_DROP, IMAGE, inputs, llava, pad, prompt, same

LAYER = 1  # nothing is pruned before it, so the plain model's attention there is the pruned one's
FAMILIES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {}),
]


def method(raters="paper", **options):
    return sparsevlm.build("sparsevlm", layers=(LAYER,), keep=(7,), raters=raters, **options)


def full_attention(model, *calls: dict) -> torch.Tensor:
    """[B, H, L, S] of the unpruned model's layer in the last of several calls on one cache."""
    seen = []
    attention = model.model.language_model.layers[LAYER].self_attn
    handle = attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    cache = DynamicCache()
    try:
        for call in calls:
            model(**call, past_key_values=cache)
    finally:
        handle.remove()
    return seen[-1]


def expected(attention: torch.Tensor, raters: list, ids: torch.Tensor) -> list[torch.Tensor]:
    """Mean over heads and raters of the attention to each visual token of the last call."""
    past = attention.shape[-1] - ids.shape[1]
    columns = [(row == IMAGE).nonzero()[:, 0] + past for row in ids]
    return [a[:, r][..., c].mean((0, 1)) for a, r, c in zip(attention, raters, columns, strict=True)]


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("layout", ["one", "batch", "multi"])
@pytest.mark.parametrize("family,config", FAMILIES)
@torch.no_grad()
def test_first_turn(family, config, layout, options):
    model = llava(family, "eager", **config)
    x, _ = inputs(layout, model)
    attention = full_attention(model, x)
    for cached in (True, False):
        with method(**options)(model) as trace:
            model(**x, use_cache=cached)
        record = trace.prefills[0]
        for got, want in zip(record.stages[0].scores, expected(attention, record.raters, x["input_ids"]), strict=True):
            same(got, want, 1e-6)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("layout", ["one", "batch", "multi"])
@pytest.mark.parametrize("family,config", FAMILIES[:5])
@torch.no_grad()
def test_every_token_rates(family, config, layout, options):
    """Visual tokens and all text behind them, of each sample its own."""
    model = llava(family, "eager", **config)
    x, _ = inputs(layout, model)
    attention = full_attention(model, x)
    with method("tokens", **options)(model) as trace:
        model(**x)
    record = trace.prefills[0]
    for b, got in enumerate(record.stages[0].scores):
        columns = (x["input_ids"][b] == IMAGE).nonzero()[:, 0]
        rating = torch.cat([columns, record.raters[b]])
        same(got, attention[b][:, rating][..., columns].mean(0).sum(0), 1e-5)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("family,config", FAMILIES)
@torch.no_grad()
def test_new_image_on_a_cache(family, config, options):
    model = llava(family, "eager", **config)
    first, _ = inputs("batch", model)
    torch.manual_seed(4)
    ids = torch.tensor([prompt([3, "I", 6]) for _ in range(3)])
    mask = torch.cat([first["attention_mask"], torch.ones_like(ids)], 1)
    pixels = torch.randn(3, 3, 42, 42, dtype=model.dtype)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    second = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "position_ids": positions}
    first["position_ids"] = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
    attention = full_attention(model, first, second)
    cache = DynamicCache()
    with method(**options)(model) as trace:
        model(**first, past_key_values=cache)
        model(**second, past_key_values=cache)
    record = trace.prefills[1]
    for got, want in zip(record.stages[0].scores, expected(attention, record.raters, ids), strict=True):
        same(got, want, 1e-6)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_raters_are_text_of_the_prompt_after_the_last_image(rule):
    model = llava()
    torch.manual_seed(2)
    rows = [prompt([4, "I", 5, "I", 8]), prompt([9, "I", 3])]
    ids, mask = pad(rows)
    x = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 42, 42, dtype=model.dtype)}
    with method(rule)(model) as trace:
        model(**x)
        model.generate(**x, max_new_tokens=3, use_cache=False)  # generated tokens do not rate
    length = ids.shape[1]
    for record in trace.prefills:
        for b, n in enumerate((8, 3)):
            raters, text = record.raters[b].tolist(), range(length - n, length)
            assert raters and set(raters) <= set(text)
            if rule in ("all", "last"):
                assert raters == list(text if rule == "all" else text[-1:])


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_rater_rules_read_the_embeddings(rule):
    """The same choice as from the embeddings directly; the scores follow the raters."""
    from sparsevlm.core.raters import select_raters

    model = llava()
    x, _ = inputs("one", model)
    visual = torch.cat(list(model.model.get_image_features(x["pixel_values"], return_dict=True).pooler_output))
    text = model.get_input_embeddings()(x["input_ids"])[:, -9:]
    with method(rule)(model) as trace:
        model(**x)
    want = select_raters(visual.view(1, -1, 64), text, rule=rule)[0].nonzero()[:, 0] + x["input_ids"].shape[1] - 9
    assert torch.equal(trace.prefills[0].raters[0], want)
