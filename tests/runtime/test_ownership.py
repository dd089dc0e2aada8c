"""One method and one thread per model, and no call that the hooks do not see."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationMixin, LlamaForCausalLM, LlavaForConditionalGeneration

import sparsevlm
from tests.tiny import GENERATE, inputs, llava, logits, same, text_config

METHODS = {
    "sparsevlm": lambda: sparsevlm.build("sparsevlm", layers=(1, 3, 5), keep=(18, 10, 5)),
    "divprune": lambda: sparsevlm.build("divprune", budget=9),
}


def elsewhere(call):
    """What `call` returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("name", METHODS)
def test_calls_from_another_thread(name):
    model = llava()
    x, _ = inputs("one", model)
    with METHODS[name]()(model) as trace:
        want = model(**x).logits
        for call in (
            lambda: model(**x),
            lambda: model(input_ids=x["input_ids"][:, -3:]),
            lambda: model.generate(**x, **GENERATE),
            lambda: model.generate(input_ids=x["input_ids"][:, -3:], max_new_tokens=2),
            lambda: model.model(**x),
        ):
            with pytest.raises(ValueError, match="active on this model in another thread.*give each thread.*its own"):
                elsewhere(call)
        with pytest.raises(ValueError, match="already active on this model"):
            elsewhere(lambda: METHODS[name]()(model).__enter__())
        assert torch.equal(model(**x).logits, want) and len(trace.prefills) == 2
    plain = elsewhere(lambda: model(**x).logits)  # and afterwards the model is anybody's
    assert torch.equal(plain, model(**x).logits)
    assert torch.equal(elsewhere(lambda: pruned(model, METHODS[name](), x)), want)


def pruned(model, method, x) -> torch.Tensor:
    with method(model):
        return model(**x).logits


def test_a_refused_call_leaves_the_one_being_made_alone():
    model = llava()
    x, _ = inputs("one", model)
    want = pruned(model, METHODS["sparsevlm"](), x)
    refused = []

    def intrude(*_):
        with pytest.raises(ValueError, match="in another thread"):
            elsewhere(lambda: model(**x))
        refused.append(1)

    model.model.language_model.layers[3].register_forward_pre_hook(intrude)
    assert torch.equal(pruned(model, METHODS["sparsevlm"](), x), want) and refused == [1]


def test_a_thread_that_was_generating_when_the_block_began():
    model = llava()
    x, _ = inputs("one", model)
    plain = model(**x).logits
    entered = []

    def enter(*_):
        if not entered:
            entered.append(METHODS["sparsevlm"]()(model))
            elsewhere(entered[0].__enter__)

    handle = model.model.language_model.layers[3].register_forward_pre_hook(enter)
    with pytest.raises(ValueError, match="in another thread"):
        model(**x)
    handle.remove()
    entered[0].__exit__(None, None, None)
    assert torch.equal(model(**x).logits, plain)


def test_two_threads_with_a_model_each():
    models = [llava(), llava()]
    x, _ = inputs("one", models[0])
    want = pruned(models[0], METHODS["sparsevlm"](), x)
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda model: [pruned(model, METHODS["sparsevlm"](), x) for _ in range(5)], models))
    assert all(torch.equal(o, want) for out in outs for o in out)


def test_blocks_on_parts_of_a_model():
    model = llava()
    mask = torch.ones(1, 20, dtype=torch.bool)
    for outer, inner in [(model, model.model.language_model), (model.model.language_model, model), (model, model)]:
        with METHODS["sparsevlm"]()(outer, visual_mask=mask):
            with pytest.raises(ValueError, match="already active on this model; leave its `with` block first"):
                METHODS["sparsevlm"]()(inner, visual_mask=mask).__enter__()


def test_two_models_that_share_a_tower():
    first, second = llava(), llava()
    second.model.vision_tower = first.model.vision_tower
    x, _ = inputs("one", first)
    with METHODS["divprune"]()(first):
        want = first(**x).logits
        with pytest.raises(ValueError, match="shares its .* with another one on which a method is active"):
            METHODS["divprune"]()(second).__enter__()
        assert torch.equal(first(**x).logits, want)
    with METHODS["divprune"]()(second):
        second(**x)


@pytest.mark.parametrize("name", METHODS)
def test_generate_of_the_class(name):
    model = llava()
    x, _ = inputs("one", model)
    before = model.generate
    with METHODS[name]()(model) as trace:
        inside = model.generate
        want = logits(model.generate(**x, **GENERATE, use_cache=False))
        same(logits(type(model).generate(model, **x, **GENERATE, use_cache=False)), want)
        with torch.inference_mode():
            same(logits(model.generate(x["input_ids"], pixel_values=x["pixel_values"], **GENERATE)), want)
        n = len(trace.prefills)
        for passed_by in (
            before,
            lambda **o: LlavaForConditionalGeneration.generate(model, **o),
            lambda **o: GenerationMixin.generate(model, **o),
        ):
            with pytest.raises(ValueError, match=r"does not know the prompt. Use model.generate\(...\)"):
                passed_by(**x, **GENERATE, use_cache=False)
        assert len(trace.prefills) == n
    same(logits(inside(**x, **GENERATE)), logits(before(**x, **GENERATE)))  # outside the block it is the model's again


def test_generate_inside_generate():
    """The inner call has its own prompt, and the outer one's holds again after it: its words are no raters."""
    model = llava()
    x, _ = inputs("one", model)
    other, _ = inputs("one", model, seed=5)
    with METHODS["sparsevlm"]()(model):
        want = [logits(model.generate(**p, **GENERATE, use_cache=False)) for p in (x, other)]
        inner = []

        def again(ids, scores):
            if not inner:
                inner.append(logits(model.generate(**other, **GENERATE, use_cache=False)))
            return scores

        outer = logits(model.generate(**x, **GENERATE, use_cache=False, logits_processor=[again]))
    assert torch.equal(outer, want[0]) and torch.equal(inner[0], want[1])


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_other_ways_to_call(name):
    model = llava()
    x, _ = inputs("batch", model)
    ids, mask, pixels = x["input_ids"], x["attention_mask"], x["pixel_values"]
    with METHODS[name]()(model) as trace:
        want = model(**x).logits
        for got in (model(ids, pixels, mask).logits, model.forward(**x).logits):
            assert torch.equal(got, want)
        for out in (
            model.model(**x),
            model.model(ids, pixels, mask),
            model.model(ids, pixel_values=pixels, attention_mask=mask),
        ):
            assert torch.equal(model.lm_head(out.last_hidden_state), want)
        assert len(trace.prefills) == 6
        embeds = model.get_input_embeddings()(ids)
        for call in (
            lambda: model.model.forward(**x),
            lambda: model.model.language_model(inputs_embeds=embeds),
            lambda: model.model.language_model.forward(inputs_embeds=embeds),
            lambda: model.model.language_model.layers[2](embeds, attention_mask=None),
        ):
            with pytest.raises(ValueError, match="can be called only through the LlavaModel .* call the model itself"):
                call()
        assert torch.equal(model(**x).logits, want)
    text = LlamaForCausalLM(text_config())
    embeds, visual = torch.randn(1, 20, 64), torch.arange(20)[None] < 12
    with METHODS["sparsevlm"]()(text, visual_mask=visual):
        want = text(inputs_embeds=embeds).logits
        assert torch.equal(text.forward(inputs_embeds=embeds).logits, want)
        assert torch.equal(text.lm_head(text.model(None, None, None, None, embeds).last_hidden_state), want)
        with pytest.raises(ValueError, match="only through the LlamaModel"):
            text.model.forward(inputs_embeds=embeds)


@pytest.mark.parametrize("name", METHODS)
def test_copies_inside_a_block(name):
    model = llava()
    x, _ = inputs("one", model)
    with METHODS[name]()(model):
        want = model(**x).logits
        for part in (model, model.model, model.model.language_model, model.model.language_model.layers[0]):
            for make in (copy.deepcopy, copy.copy, pickle.dumps):
                with pytest.raises(ValueError, match="a copy would keep its hooks. Copy or pickle it outside"):
                    make(part)
        with pytest.raises(ValueError, match="a copy would keep its hooks"):
            copy.deepcopy(torch.nn.ModuleList([model]))
        model.state_dict()
        assert torch.equal(model(**x).logits, want)
    plain = model(**x).logits
    assert torch.equal(copy.deepcopy(model)(**x).logits, plain)


def fail(*_):
    raise RuntimeError("by the test")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "place",
    [
        "vision_tower",
        "multi_modal_projector",
        "language_model.layers.0.mlp",
        "language_model.layers.4",
        "language_model.norm",
    ],
)
@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind(name, place):
    model = llava()
    x, _ = inputs("batch", model)
    words = {"input_ids": torch.randint(3, 90, x["input_ids"].shape)}
    text = model(**words).logits
    with METHODS[name]()(model) as trace:
        want = model(**x).logits
        pooled = model.model.get_image_features(x["pixel_values"][:1]).pooler_output
        for call in (model, model.generate):
            handle = model.model.get_submodule(place).register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="by the test"):
                call(**x, **({} if call is model else GENERATE))
            handle.remove()
            with pytest.raises(ValueError, match="only through the LlavaModel"):
                model.model.language_model(inputs_embeds=torch.randn(*x["input_ids"].shape, 64, dtype=model.dtype))
            assert torch.equal(model(**words).logits, text)
            again = model.model.get_image_features(x["pixel_values"][:1]).pooler_output
            assert all(torch.equal(a, b) for a, b in zip(pooled, again, strict=True))
            trace.clear()
            assert torch.equal(model(**x).logits, want) and len(trace.prefills) == 1


def test_continuous_batching():
    model = LlamaForCausalLM(text_config(layers=2)).eval()
    visual = torch.tensor([[True, True, False]])
    with sparsevlm.build("random", budget=1)(model, visual_mask=visual):
        for call in (
            lambda: model.generate_batch([[3, 4, 5]], max_new_tokens=2),
            lambda: model.generate(torch.tensor([[3, 4, 5]]), cache_implementation="paged", max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=r"continuous batching .* cannot be pruned.* Use model.generate"):
                call()


def test_activation_checkpointing():
    """The backward pass computes each layer again, as it was when it was pruned."""
    model = llava().train()
    x, _ = inputs("one", model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        with METHODS["sparsevlm"]()(model):
            model(**x, use_cache=False).logits[:, -1].square().sum().backward()
        gradients.append([p.grad for p in model.model.language_model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        same(a, b)
    assert gradients[0][0] is not gradients[1][0]


def test_pixels_of_a_wrong_shape():
    model = llava()
    x, _ = inputs("one", model)
    words = {"input_ids": torch.randint(3, 90, x["input_ids"].shape)}
    text = model(**words).logits
    for name in METHODS:
        with METHODS[name]()(model):
            with pytest.raises(ValueError, match="Input image size"):
                model(**x | {"pixel_values": x["pixel_values"][..., :35]})
            assert torch.equal(model(**words).logits, text)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_generate_of_a_model_whose_part_is_pruned(name):
    model, text = llava(), LlamaForCausalLM(text_config()).eval()
    x, _ = inputs("one", model)
    with METHODS[name]()(model):
        want = model.model(**x).last_hidden_state
    with METHODS[name]()(model.model):
        for options in ({}, {"use_cache": False}, {"num_beams": 2, "output_logits": False}):
            with pytest.raises(ValueError, match="a part of the LlavaForConditionalGeneration whose generate.. runs"):
                model.generate(**x, **GENERATE | options)
        assert torch.equal(model.model(**x).last_hidden_state, want)
        generated = []

        def another(ids, scores):  # a generate() of a model that has nothing to do with it
            generated.append(model.model(**x).last_hidden_state)
            return scores

        text.generate(torch.tensor([[5]]), max_new_tokens=1, logits_processor=[another], pad_token_id=0)
        assert torch.equal(generated[0], want)
    visual = torch.arange(20)[None] < 12
    with sparsevlm.build("random", budget=4)(text.model, visual_mask=visual):
        with pytest.raises(ValueError, match="a part of the LlamaForCausalLM .* Enter it with the whole model"):
            text.generate(inputs_embeds=torch.randn(1, 20, 64), max_new_tokens=2)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_block_ends_however_it_is_left(name):
    model = llava()
    x, _ = inputs("one", model)
    plain = model(**x).logits
    before = [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    want = pruned(model, METHODS[name](), x)

    def interrupt(ids, scores):
        raise KeyboardInterrupt

    for error, act in (
        (KeyboardInterrupt, lambda: model.generate(**x, **GENERATE, logits_processor=[interrupt])),
        (ZeroDivisionError, lambda: 1 / 0),
    ):
        with pytest.raises(error):
            with METHODS[name]()(model):
                model(**x)
                act()
        assert [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
        assert torch.equal(model(**x).logits, plain) and torch.equal(pruned(model, METHODS[name](), x), want)
    with METHODS[name]()(model):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**x, **GENERATE, logits_processor=[interrupt])
        assert torch.equal(model(**x).logits, want)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_saving_a_whole_model(name, tmp_path):
    model = llava()
    x, _ = inputs("one", model)
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "before.pt")
    with METHODS[name]()(model) as trace:
        want = model(**x).logits
        with pytest.raises(ValueError, match="a copy would keep its hooks"):
            torch.save(model, tmp_path / "inside.pt")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        shown = pickle.loads(pickle.dumps(trace))
        assert torch.equal(shown.prefills[0].stages[0].kept[0], trace.prefills[0].stages[0].kept[0])
    loaded = torch.load(tmp_path / "before.pt", weights_only=False)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    for other in (copied, copy.deepcopy(model), loaded):
        assert torch.equal(pruned(other, METHODS[name](), x), want)
        assert torch.equal(other(**x).logits, model(**x).logits)


@torch.no_grad()
def test_what_was_announced_is_forgotten_when_a_later_check_fails():
    """Pictures that the caller encodes himself afterwards are nobody's."""
    model = llava()
    x, _ = inputs("batch", model)
    with METHODS["divprune"]()(model, visual_mask=x["input_ids"] == 98):
        want = model.model.get_image_features(x["pixel_values"][:2]).pooler_output
        with pytest.raises(ValueError, match="visual_mask has 3 rows, the input 2"):
            model(**{k: v[:2] for k, v in x.items()})
        again = model.model.get_image_features(x["pixel_values"][:1]).pooler_output
    same(again[0], want[0])
