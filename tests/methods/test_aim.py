"""AIM: merging before the language model, pruning to nothing inside it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import sparsevlm
from tests.methods.test_before_model import deep, features, handed_on
from tests.tiny import GENERATE, IMAGE, PATCHES, inputs, llava, logits, same


def model_of(layers: int):
    """A tower of five blocks before a language model of `layers` layers."""
    model, tower = llava(layers=layers, impl="sdpa"), deep()
    model.model.vision_tower = tower.model.vision_tower
    model.model.config.vision_feature_layer = -2
    model.set_attn_implementation({"text_config": "eager"})
    return model.requires_grad_(False).float()  # eager attention softmaxes in float32


def merge_by_hand(model, pixels, count: int) -> torch.Tensor:
    """[count, d] merged features, token by token; keys are those of the block after the one that is read."""
    out = features(model, pixels)
    block = model.model.vision_tower.encoder.layers[-1]
    x, metric = out[0, 1:], block.self_attn.k_proj(block.layer_norm1(out))[0, 1:]
    while len(x) > count:
        edges = []
        for i in range(0, len(x), 2):
            j = max(range(1, len(x), 2), key=lambda j, i=i: float(F.cosine_similarity(metric[i], metric[j], dim=0)))
            edges.append((float(F.cosine_similarity(metric[i], metric[j], dim=0)), i, j))
        edges.sort(reverse=True)
        now = min(len(x) - count, len(edges))
        groups = [[i] for _, i, _ in edges[now:]]
        groups += [[j, *(i for _, i, k in edges[:now] if k == j)] for j in range(1, len(x), 2)]
        x = torch.stack([x[g].mean(0) for g in groups])
        metric = torch.stack([metric[g].mean(0) for g in groups])
    return x


def short_prompt(model, x, count: int) -> tuple[torch.Tensor, int]:
    """Embeddings of the prompt with merged tokens, and where these start."""
    embeds = model.get_input_embeddings()(x["input_ids"])
    start = x["input_ids"][0].tolist().index(IMAGE)
    merged = model.model.multi_modal_projector(merge_by_hand(model, x["pixel_values"], count))[None]
    return torch.cat([embeds[:, :start], merged, embeds[:, start + PATCHES :]], 1), start


@pytest.mark.parametrize("count", [30, 18, 10, 1])
def test_merging_token_by_token(count):
    model = model_of(2)
    x, _ = inputs("one", model)
    method = sparsevlm.build("aim", budget=count, prune=False)
    seen, trace, out = handed_on(model, method, x)
    same(seen[0], merge_by_hand(model, x["pixel_values"], count), 1e-4)
    assert trace.prefills[0].leaving == [count]
    same(out[:, -1], model(inputs_embeds=short_prompt(model, x, count)[0]).logits[:, -1], 2e-4)


def test_importance_is_five_steps_of_sharpened_attention():
    model = model_of(6)
    x, _ = inputs("one", model)
    embeds, start = short_prompt(model, x, 10)
    attention = model(inputs_embeds=embeds, output_attentions=True).attentions[2][0].double()
    p = torch.full((attention.shape[0], 1, embeds.shape[1]), 1 / embeds.shape[1]).double()
    flow = (attention.log() / 0.1).softmax(-1)
    for _ in range(5):
        p = p @ flow
    want = p[:, 0].square().mean(0).sqrt()[start : start + 10]
    method = sparsevlm.build("aim", merge_to=10, first=2, last=3)
    _, trace, _ = handed_on(model, method, x)
    before, stage, last = trace.prefills[0].stages
    assert [s.layer for s in trace.prefills[0].stages] == [-1, 2, 3]
    same(stage.scores[0].double(), want, 1e-4)
    assert torch.equal(stage.kept[0], want.topk(5).indices.sort().values)
    assert torch.isin(stage.origin[0], before.kept[0]).all() and (stage.origin[0] >= 10).any()
    assert last.tokens_out == [0] and len(last.kept[0]) == 0


def test_after_the_last_layer_there_is_only_text_at_the_positions_of_the_merged_prompt():
    model = model_of(6)
    x, rows = inputs("one", model)
    embeds, start = short_prompt(model, x, 10)
    decoder = model.model.language_model
    states = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[5]
    text = torch.tensor([i for i in range(embeds.shape[1]) if not start <= i < start + 10])
    causal = torch.full((1, 1, len(text), len(text)), torch.finfo(states.dtype).min).to(states).triu(1)
    rope = decoder.rotary_emb(states, text[None])
    out = decoder.layers[5](states[:, text], attention_mask=causal, position_embeddings=rope)
    want = model.lm_head(decoder.norm(out if isinstance(out, torch.Tensor) else out[0]))
    with sparsevlm.build("aim", merge_to=10, first=4, last=4)(model):
        result = model(**x, use_cache=True)
        cached = model.generate(**x, **GENERATE)
        free = model.generate(**x, **GENERATE, use_cache=False)
    same(result.logits[:, -1], want[:, -1], 2e-4)
    same(logits(cached), logits(free), 2e-4)  # the tokens that follow stand behind the merged prompt, too
    n = len(rows[0]) - PATCHES
    assert [c.keys.shape[2] for c in result.past_key_values.layers] == [n + 10] * 5 + [n]


def test_budgets():
    for budget, merged in ((192, 373), (128, 249), (64, 125)):
        plan = sparsevlm.build("aim", budget=budget).plan(576, 32)
        assert abs(plan.keep[0] - merged) <= 1 and abs(plan.leaving - budget) <= 0.5
        assert plan.layers == (-1, *range(13, 21)) and plan.keep[-1] == 0
    assert sparsevlm.build("aim", merge_to=252).plan(576, 32).leaving == pytest.approx(129.9, abs=0.5)
    assert sparsevlm.build("aim", budget=576).plan(576, 32).leaving == 576
    with pytest.raises(ValueError, match="Use at most 297"):
        sparsevlm.build("aim", budget=400).plan(576, 32)
    for options in (dict(budget=9, merge_to=3), dict(merge_to=0), dict(budget=9, temperature=0)):
        with pytest.raises(ValueError, match="|".join(options)):
            sparsevlm.build("aim", **options)
    with (
        pytest.raises(ValueError, match="first layer 6 comes after"),
        sparsevlm.build("aim", budget=9, first=6)(llava()),
    ):
        pass


@pytest.mark.parametrize("ablated", [dict(prune=False), dict(steps=1), dict(temperature=1.0), dict(first=3)])
def test_each_part_matters(ablated):
    model = model_of(8)
    x, _ = inputs("batch", model)
    a = handed_on(model, sparsevlm.build("aim", merge_to=12, first=2, last=5), x)[2]
    b = handed_on(model, sparsevlm.build("aim", **dict(merge_to=12, first=2, last=5) | ablated), x)[2]
    assert (a - b)[:, -1].abs().max() > 1e-3
