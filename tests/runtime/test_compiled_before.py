"""Graphs that torch.compile made of the unpruned model are not used inside a block, nor those of a block after it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import sparsevlm
from tests.tiny import GENERATE, inputs, llava, logits, same

METHODS = {
    "sparsevlm": lambda **o: sparsevlm.build("sparsevlm", layers=(0, 1), keep=(18, 7), **o),
    "plus": lambda **o: sparsevlm.build("sparsevlm_plus", layers=(0, 1), keep=(18, 7), **o),
    "divprune": lambda **o: sparsevlm.build("divprune", budget=9),
    "none": lambda **o: sparsevlm.build("none"),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(layers=3):
    return llava(dtype=torch.float32, layers=layers)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled_decoding() -> dict:
    """As on a GPU, where generate() with a static cache compiles the decode step by itself."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def generate(model, x, method=None, **options) -> torch.Tensor:
    with method(model) if method else nullcontext():
        return logits(model.generate(**x, **GENERATE, **options))


@pytest.mark.parametrize(
    "layout,name",
    [
        ("one", "sparsevlm"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("one", "divprune"), ("batch", "plus")]),
    ],
)
def test_generate_with_a_static_cache(layout, name):
    model = tiny()
    x, _ = inputs(layout, model)
    plain, want = generate(model, x), generate(model, x, METHODS[name]())
    assert not torch.allclose(plain, want, atol=1e-2)
    count = []
    for method, expected in [(None, plain), (name, want), (name, want), (None, plain)]:
        same(generate(model, x, method and METHODS[method](), **compiled_decoding()), expected)
        count.append(graphs())
    assert count == [1, 2, 2, 2]  # one without and one with the hooks; the second block makes none


@pytest.mark.slow
def test_one_block_after_another():
    """A graph that one method's block made does not stand in for another's."""
    model = tiny()
    x, _ = inputs("one", model)
    options = [{}, {"positions": "original"}, {"positions": "original", "recycle": 0.0}, {}]
    for o in options:
        want = generate(model, x, METHODS["sparsevlm"](**o))
        same(generate(model, x, METHODS["sparsevlm"](**o), **compiled_decoding()), want)
    same(generate(model, x, **compiled_decoding()), generate(model, x))


def compile_outside(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_layers(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    return model


def compile_decoder(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def compile_tower(model):
    model.model.vision_tower.compile(backend="eager")
    return model


FORMS = [compile_outside, compile_in_place, compile_forward, compile_layers, compile_decoder, compile_tower]
QUICK = [(compile_layers, "sparsevlm"), (compile_tower, "divprune")]
SLOW = [case for case in product(FORMS, ["sparsevlm", "divprune"]) if case not in QUICK]


@pytest.mark.parametrize("form,name", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
@torch.no_grad()
def test_models_compiled_before_the_block(form, name):
    reference, model = tiny(2), tiny(2)
    x, _ = inputs("one", model)
    method = {
        "sparsevlm": lambda: sparsevlm.build("sparsevlm", layers=(0,), keep=(7,)),
        "divprune": lambda: sparsevlm.build("divprune", budget=9),
    }[name]
    plain = reference(**x).logits
    with method()(reference):
        want = reference(**x).logits
    network = form(model)
    before = set(vars(model))
    same(network(**x).logits, plain)
    assert graphs()
    with method()(network) as trace:
        same(network(**x).logits, want)
        network.generate(**x, max_new_tokens=1)
    assert len(trace.prefills) == 2
    same(network(**x).logits, plain)
    assert set(vars(model)) == before and "generate" not in before


@pytest.mark.slow
@torch.no_grad()
def test_compiled_prefills_of_other_prompts():
    """What is decided on the host for one prompt is not built into the graph that the next one meets."""
    model = tiny(2)
    first, second = (inputs(layout, model)[0] for layout in ("one", "ragged"))
    moved = {**first, "input_ids": first["input_ids"].roll(3, 1)}  # the image elsewhere, the same length
    network = torch.compile(model, backend="eager")
    for x in (first, second, moved):
        with sparsevlm.build("sparsevlm", layers=(0,), keep=(7,))(model):
            real = x["attention_mask"].bool()
            same(network(**x).logits[real], model(**x).logits[real])
