"""What is refused, when, and in what words: always before anything is installed or computed."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

import sparsevlm
from tests.tiny import inputs, llava, text_config

METHODS = ["none", "random", "sparsevlm", "sparsevlm_plus", "sparsevlm_rank"]
SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def test_unknown_method():
    with pytest.raises(
        ValueError, match=r"unknown method 'sparsvlm'\. Did you mean 'sparsevlm'\? Known methods: .*none,"
    ):
        sparsevlm.build("sparsvlm")
    with pytest.raises(ValueError, match=r"unknown method 'xyzzy'\. Known methods: "):
        sparsevlm.build("xyzzy")
    for name in ("base", "__init__", "Method", "", "_vision"):
        with pytest.raises(ValueError, match="unknown method"):
            sparsevlm.build(name)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_option(name):
    with pytest.raises(ValueError, match=f"method '{name}' has no option 'buget'. Its options: .*budget"):
        sparsevlm.build(name, buget=64)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("sparsevlm", {"raters": "best"}, "rater rule 'best' is unknown; known: paper, all, centred, last"),
        ("sparsevlm", {"merge": "max"}, "merge 'max' is unknown; known: mean, sum"),
        ("sparsevlm", {"positions": "new"}, "positions 'new' is unknown; known: renumber, original"),
        ("sparsevlm", {"recycled_at": "start"}, "recycled_at 'start' is unknown; known: end, centre"),
        ("sparsevlm_rank", {"rule": "v3"}, "rule 'v3' is unknown; known: paper, v1.0, video"),
        (
            "sparsevlm_rank",
            {"keep": (3, 2, 1)},
            "decides how many tokens to keep. Use sparsevlm for keep lists",
        ),
        ("sparsevlm_rank", {"budget": 64}, "has no budget .got 64.. Use lam, or scale and bias"),
        ("sparsevlm_rank", {"lam": 1.5}, "lam 1.5 is a share between 0 and 1"),
        ("sparsevlm_plus", {"heads": 0}, "heads 0 is neither a share in .0, 1. nor a whole number of heads"),
        ("sparsevlm_plus", {"heads": 2.5}, "heads 2.5 is neither a share"),
        ("sparsevlm_plus", {"heads": -1}, "heads -1 is neither a share"),
        ("sparsevlm_plus", {"kernel_floor": 0.0}, "kernel_floor 0.0 is not positive"),
    ],
)
def test_options_outside_their_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build(name, **options)


def test_more_priority_heads_than_the_model_has():
    with pytest.raises(ValueError, match="heads 14 is above the model's 4 attention heads. Use a share instead"):
        with sparsevlm.build("sparsevlm_plus", heads=14)(llava()):
            pass
    with sparsevlm.build("sparsevlm_plus", heads=4)(llava()):
        pass


def fused():
    return Phi3ForCausalLM(Phi3Config(**SMALL))


def fused_in_llava():
    vision = llava().config.vision_config
    config = LlavaConfig(
        vision_config=vision, text_config=Phi3Config(**SMALL), image_token_index=98, image_seq_length=36
    )
    return LlavaForConditionalGeneration(config)


def gemma():
    return GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=16))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))


def running_state():
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config={**SMALL, "num_hidden_layers": 4, "head_dim": 16}, vision_config=vision)
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "make,message",
    [
        (fused, "models of type 'phi3' are not supported.*query, key and value projections are fused"),
        (fused_in_llava, "text model 'phi3' is not supported in a model of type 'llava'.*fused.*Use one over llama"),
        (running_state, "models of type 'qwen3_5' are not supported. Some of its layers keep a running state"),
        (gemma, "models of type 'gemma' are not supported. Use one of llava, video_llava, .*llama, mistral"),
        (gpt2, "models of type 'gpt2' are not supported"),
        (lambda: torch.nn.Linear(2, 2), "models of type 'Linear' are not supported"),
    ],
    ids=["phi3", "llava-phi3", "qwen3.5", "gemma", "gpt2", "no-model"],
)
def test_models_that_are_not_supported(make, message, name):
    model = make()
    mask = torch.ones(1, 4, dtype=torch.bool)
    before = hooks_of(model)
    with pytest.raises(ValueError, match=message), sparsevlm.build(name)(model, visual_mask=mask):
        pass
    assert hooks_of(model) == before and "generate" not in vars(model)


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    "mask,message",
    [
        (None, r"a plain text model needs visual_mask=: a \[B, L\] bool tensor, True at visual tokens"),
        (torch.ones(1, 20, dtype=torch.long), r"visual_mask must be \[B, L\] bool, not \(1, 20\) torch.int64"),
        (torch.ones(20, dtype=torch.bool), r"visual_mask must be \[B, L\] bool, not \(20,\) torch.bool"),
    ],
)
def test_visual_masks(mask, message):
    model = LlamaForCausalLM(text_config(layers=2))
    with pytest.raises(ValueError, match=message), sparsevlm.build("sparsevlm")(model, visual_mask=mask):
        pass
    assert hooks_of(model) == 0


def test_visual_mask_of_other_rows():
    model = LlamaForCausalLM(text_config(layers=2))
    mask = torch.arange(20).expand(2, -1) < 10
    with pytest.raises(ValueError, match="visual_mask has 2 rows, the input 3"):
        with sparsevlm.build("random", budget=4)(model, visual_mask=mask):
            model(inputs_embeds=torch.randn(3, 20, 64))


def test_two_methods_at_once():
    model = llava()
    x, _ = inputs("one", model)
    with sparsevlm.build("sparsevlm", budget=12)(model) as outer:
        with pytest.raises(ValueError, match="already active on this model; leave its `with` block first"):
            with sparsevlm.build("random", budget=9)(model.model):  # the same decoder
                pass
        model(**x)  # the first one still works
    assert outer.prefills[0].leaving == pytest.approx([12], abs=0.5)
    with sparsevlm.build("random", budget=9)(model) as trace:  # and the model is free again
        model(**x)
    assert trace.prefills[0].leaving == [9]
    other = llava()
    with sparsevlm.build("random", budget=9)(model), sparsevlm.build("random", budget=7)(other) as trace:
        other(**x)
    assert trace.prefills[0].leaving == [7]


@pytest.mark.parametrize("name", METHODS)
def test_methods_build_without_options_and_show_them(name):
    assert name in sparsevlm.methods()
    method = sparsevlm.build(name)
    assert "budget=None" in repr(method) and method == sparsevlm.build(name)
