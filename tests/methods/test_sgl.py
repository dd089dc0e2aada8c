"""SGL: the guide's attention, restated from whole maps; who asks it when; guides that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sparsevlm
from sparsevlm.runtime.guide import Guide
from tests.tiny import GENERATE, IMAGE, PATCHES, inputs, llava, logits, same, single, text_config, video_llava

LARGE = llava()
SMALL = llava(layers=2, seed=5)
ANSWER = 3


def build(guide=SMALL, **options):
    return sparsevlm.build("sgl", guide=guide, **{"budget": 12, "answer_tokens": ANSWER} | options)


def whole_maps(model, x: dict, answer_tokens: int, layers: int, mean: bool = False, skip: int = 0) -> Tensor:
    """[V] from all attention maps of an unpruned model on one prompt, whose answer is fed token by token."""
    model.set_attn_implementation("eager")
    ids = x["input_ids"][0]
    visual = (ids == IMAGE).nonzero()[:, 0]
    pool = torch.Tensor.mean if mean else torch.Tensor.sum
    cache = DynamicCache()
    out = model(**x, past_key_values=cache, output_attentions=True)
    maps = [m[0, :, int(visual[-1]) + skip :, visual] for m in out.attentions[:layers]]
    ends = model.generation_config.eos_token_id
    for _ in range(answer_tokens - 1):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        if int(token) == ends:
            break
        out = model(input_ids=token, past_key_values=cache, output_attentions=True)
        maps += [m[0, :, :, visual] for m in out.attentions[:layers]]
    model.set_attn_implementation("sdpa")
    return sum(pool(pool(m.double(), 1), 0) for m in maps)


def scores(model, method, x: dict) -> list[Tensor]:
    """Importance of each prompt's visual tokens, from one forward."""
    with method(model) as trace:
        model(**x)
    return trace.prefills[0].stages[0].scores


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answer_tokens,layers", [(0, 2), (0, 1), (1, 2), (ANSWER, 2), (ANSWER, 1)])
def test_importance_is_the_sum_over_whole_maps(side: str, answer_tokens: int, layers: int):
    guide = llava(layers=2, seed=5, dtype=torch.float32)
    large = llava(dtype=torch.float32)
    x, rows = inputs("ragged", large, side=side)
    got = scores(large, build(guide, answer_tokens=answer_tokens, layers=layers), x)
    for b in range(2):
        want = whole_maps(guide, single(x, rows, b), answer_tokens, layers)
        same(got[b].double(), want, 1e-5)
        wrong = whole_maps(guide, single(x, rows, b), answer_tokens, layers, skip=1)
        assert float((got[b] - wrong).abs().max()) > 0.01 * float(wrong.max())  # the last visual token's own row


def test_the_model_itself_as_guide_is_not_disturbed_by_its_own_pruning():
    large = llava(dtype=torch.float32)
    x, rows = inputs("batch", large)
    for method in (build("self"), build(large), build("self", k=0, budget=None, keep=5)):
        got = scores(large, method, x)
        for b in range(3):
            same(got[b].double(), whole_maps(large, single(x, rows, b), ANSWER, 8), 2e-5)


def test_an_answer_ends_where_the_guide_ends_it_and_later_rows_do_not_count():
    guide = llava(layers=2, seed=5)
    x, rows = inputs("batch", LARGE)
    first = [int(guide(**single(x, rows, b)).logits[0, -1].argmax()) for b in range(3)]
    assert first[0] not in first[1:]
    plain = scores(LARGE, build(guide), x)
    guide.generation_config.eos_token_id = first[0]
    ended = scores(LARGE, build(guide), x)
    prompt = scores(LARGE, build(guide, answer_tokens=0), x)
    same(ended[0], prompt[0])
    assert not torch.allclose(plain[0], prompt[0])
    for b in range(3):
        same(ended[b], whole_maps(guide, single(x, rows, b), ANSWER, 2), 1e-5)  # eager: float32


class Asked(Guide):
    """Counts how often guides are asked."""

    times = 0

    def ask(self, prompts):
        Asked.times += 1
        return super().ask(prompts)


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr("sparsevlm.methods.sgl.Guide", Asked)
    Asked.times = 0
    return Asked


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generate_asks_the_guide_once(asked, options: dict):
    x, _ = inputs("batch", LARGE)
    with build()(LARGE):
        LARGE.generate(**x, **GENERATE | options)
    assert asked.times == 1


def test_beams_keep_what_greedy_search_keeps():
    x, _ = inputs("ragged", LARGE)
    kept = []
    for options in ({}, {"num_beams": 3}):
        with build()(LARGE) as trace:
            LARGE.generate(**x, **GENERATE | options)
        kept.append(trace.prefills[0].stages[0].kept)
    for b in range(2):
        assert torch.equal(kept[0][b], kept[1][3 * b])


@pytest.mark.parametrize("guide", [SMALL, "self"], ids=["guide", "self"])
def test_nothing_to_drop_nothing_asked(asked, guide):
    x, _ = inputs("one", LARGE)
    text = {"input_ids": torch.tensor([[1, 5, 7, 9]])}
    with build(guide)(LARGE) as trace:
        LARGE.generate(**text, **GENERATE)
    with build(guide, budget="full")(LARGE):
        LARGE.generate(**x, **GENERATE)
    with build(guide, budget=None, keep=PATCHES)(LARGE):
        got = logits(LARGE.generate(**x, **GENERATE))
    assert asked.times == 0 and not trace.prefills
    assert torch.equal(got, logits(LARGE.generate(**x, **GENERATE)))


@pytest.mark.parametrize("guide", [SMALL, "self"], ids=["guide", "self"])
def test_second_turn_of_text_asks_nothing_and_of_a_picture_asks_about_that_picture(asked, guide):
    x, _ = inputs("one", LARGE)
    with build(guide)(LARGE) as trace:
        out = LARGE(**x, use_cache=True)
        LARGE(input_ids=torch.tensor([[7, 8]]), past_key_values=out.past_key_values)
        assert asked.times == 1
        new = dict(x, attention_mask=torch.ones(1, 2 * x["input_ids"].shape[1] + 2, dtype=torch.long))
        LARGE(**new, past_key_values=out.past_key_values)
    assert asked.times == 2
    first, second = (p.stages[0].scores[0] for p in trace.prefills)
    same(first, scores(LARGE, build(guide), x)[0])
    if guide is SMALL:
        same(second, first)  # it does not see earlier turns


def test_k_0_drops_before_the_first_layer_and_scores_do_not_depend_on_k():
    x, _ = inputs("batch", LARGE)
    traces = []
    for k in (0, 1, 4):
        with build(k=k, budget=None, keep=9)(LARGE) as trace:
            out = LARGE(**x, use_cache=True)
        traces.append(trace.prefills[0])
        lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        whole, short = x["input_ids"].shape[1], x["input_ids"].shape[1] - PATCHES + 9
        assert lengths == [whole] * k + [short] * (8 - k)
    for trace in traces:
        for b in range(3):
            assert torch.equal(trace.stages[0].kept[b], traces[0].stages[0].kept[b])
    with build(k=0)(LARGE) as trace:
        LARGE(**x)
    assert trace.prefills[0].leaving == trace.prefills[0].entering == [12.0] * 3


def test_given_importance_decides():
    x, _ = inputs("ragged", LARGE)
    importance = torch.rand(3, 2 * PATCHES)
    with sparsevlm.build("sgl", importance=importance, budget=12)(LARGE) as trace:
        LARGE.generate(**x, **GENERATE | {"num_beams": 2})
    (one, *_), (two, *_) = (trace.prefills[0].stages[0].scores[i : i + 2] for i in (0, 2))
    assert torch.equal(one, importance[0, :PATCHES]) and torch.equal(two, importance[1])


def shared_pair():
    """A large model, and a guide with its tower, projector and words."""
    guide = llava(layers=2, seed=5)
    for name in ("vision_tower", "multi_modal_projector"):
        getattr(guide.model, name).load_state_dict(getattr(LARGE.model, name).state_dict())
    guide.get_input_embeddings().load_state_dict(LARGE.get_input_embeddings().state_dict())
    return guide


def test_a_guide_that_shares_the_tower_reads_what_the_models_own_has_made():
    guide, runs = shared_pair(), []
    x, _ = inputs("ragged", LARGE)
    own = scores(LARGE, build(guide, shared=False), x)
    handle = guide.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    for shared in (None, True):
        for one, other in zip(own, scores(LARGE, build(guide, shared=shared), x), strict=True):
            if one is not None:
                same(one, other)
    assert not runs
    handle.remove()
    with build(guide)(LARGE):  # embeddings will do
        embeds = LARGE.get_input_embeddings()(x["input_ids"])
        LARGE(inputs_embeds=embeds, attention_mask=x["attention_mask"], pixel_values=x["pixel_values"])


def refusal(model, method, call=lambda: None) -> str:
    with pytest.raises(ValueError) as error, method(model):
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_guides_that_do_not_fit():
    text = sparsevlm.build("sgl", guide="self")
    assert "needs a guide. Use guide=" in refusal(LARGE, sparsevlm.build("sgl", budget=9))
    assert "guide sees 16 visual tokens, the model 36" in refusal(LARGE, build(llava(image=28)))
    assert "another vocabulary (90 words" in refusal(LARGE, build(llava(layers=2, vocab_size=90)))
    assert "another vocabulary" in refusal(LARGE, build(video_llava(layers=2)))
    from transformers import AutoModelForCausalLM

    words = AutoModelForCausalLM.from_config(text_config(layers=2))
    assert "no vision tower" in refusal(LARGE, build(words))
    assert "the guide's vision_tower is not the model's" in refusal(LARGE, build(shared=True))
    assert "has 2 layers. Use 1 to 2" in refusal(LARGE, build(layers=3))
    assert "no output head" in refusal(LARGE, build(SMALL.model))
    assert "must be a model, a folder, a hub id" in refusal(LARGE, build(3))
    assert text.guide == "self"
    for options, message in [
        (dict(guide="self", shared=False), "Leave shared out"),
        (dict(guide="self", importance=torch.rand(1, 3)), "exclude each other"),
        (dict(importance=torch.rand(3)), "tensor \\[B, V\\]"),
        (dict(answer_tokens=-1), "at least 0"),
        (dict(layers=0), "at least 1"),
        (dict(k=-1), "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparsevlm.build("sgl", **options)


def test_calls_that_a_guide_cannot_follow():
    x, _ = inputs("batch", LARGE)
    embeds = {"inputs_embeds": LARGE.get_input_embeddings()(x["input_ids"])}
    rest = {k: v for k, v in x.items() if k != "input_ids"}
    assert "reads input_ids" in refusal(LARGE, build(), lambda: LARGE(**embeds, **rest))
    assert "reads input_ids" in refusal(LARGE, build(), lambda: LARGE.generate(**embeds, **rest, **GENERATE))
    features = LARGE.model.get_image_features(x["pixel_values"], return_dict=True)
    encoded = dict(x, mm_encoder_outputs={"image": features}, pixel_values=None)
    assert "needs the pictures" in refusal(LARGE, build(), lambda: LARGE(**encoded))
    no_mask = {k: v for k, v in x.items() if k != "attention_mask"}
    assert "what is padding" in refusal(LARGE, build(), lambda: LARGE.generate(**no_mask, **GENERATE))
    wrong = sparsevlm.build("sgl", importance=torch.rand(3, PATCHES - 1), budget=9)
    assert "importance is [3, 35], the prompts have 3 x 36" in refusal(LARGE, wrong, lambda: LARGE(**x))
    wrong = sparsevlm.build("sgl", importance=torch.rand(2, PATCHES), budget=9)
    assert "importance is [2, 36], the prompts have 3 x 36" in refusal(LARGE, wrong, lambda: LARGE(**x))
    with sparsevlm.build("fastv", budget=9)(SMALL):
        assert "a method is active on the guide" in refusal(LARGE, build(), lambda: LARGE(**x))
    with build()(LARGE):  # nothing of an earlier call is left for one that the guide has not seen
        LARGE(**x)
        with pytest.raises(ValueError, match="needs the pictures"):
            LARGE(**encoded)


def test_a_failing_guide_leaves_the_model_as_it_was():
    x, _ = inputs("one", LARGE)
    want = logits(LARGE.generate(**x, **GENERATE))
    guide = copy.deepcopy(SMALL)
    guide.model.language_model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))
    for g in (guide, "self"):
        method = build(g)
        with method(LARGE):
            if g == "self":
                handle = LARGE.model.language_model.norm.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises((KeyError, ZeroDivisionError)):
                LARGE.generate(**x, **GENERATE)
            if g == "self":
                handle.remove()
                LARGE.generate(**x, **GENERATE)
    assert not any(layer.self_attn._forward_hooks for layer in LARGE.model.language_model.layers)
    assert torch.equal(logits(LARGE.generate(**x, **GENERATE)), want)
