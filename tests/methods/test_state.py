"""A method is a frozen configuration: using it leaves no trace in it, and traces can be copied and kept."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import sparsevlm
from tests.methods.test_cdpruner import Letters, clip
from tests.methods.test_matrix import METHODS
from tests.methods.test_matrix import build as build_of_matrix
from tests.tiny import inputs, llava, same

NAMES = sorted(METHODS)
NETWORKS = ("anchorprune", "cdpruner")  # have one as an option, which is made here
OWN_NETWORK = (*NETWORKS, "sgl, guide")  # networks are equal to themselves only


def ask(ids: torch.Tensor) -> str:
    return f"what is {int(ids[-1])}"


def build(name: str, **options):
    if name in NETWORKS:
        return sparsevlm.build(name, budget=9, clip=clip(), tokenizer=Letters(), question=ask, **options)
    return build_of_matrix(name, **options)


def answers(model, x: dict) -> torch.Tensor:
    """Logits of a prompt, and of a token after it."""
    with torch.no_grad():
        out = model(**x, position_ids=(x["attention_mask"].cumsum(1) - 1).clamp(min=0))
        length = x["input_ids"].shape[1]
        token = torch.full((len(x["input_ids"]), 1), 7)
        mask = torch.nn.functional.pad(x["attention_mask"], (0, 1), value=1)
        step = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=out.past_key_values,
        )
    assert out.logits.shape[1] == length
    return torch.cat([out.logits[:, -1], step.logits[:, -1]])


@pytest.mark.parametrize("name", NAMES)
def test_a_used_method_is_as_new(name):
    model = llava()
    method = build(name)
    new, fields = copy.copy(method), dict(vars(method))
    for kind in ("one", "ragged"):
        x, _ = inputs(kind, model)
        with method(model):
            answers(model, x)
    assert vars(method) == fields and method == new and repr(method) == repr(new)
    assert replace(method) == method
    if name not in OWN_NETWORK:
        assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method == build(name)
    with pytest.raises(FrozenInstanceError):
        method.budget = 3


@pytest.mark.parametrize("name", [n for n in NAMES if "heads" not in METHODS[n].options])  # a file fits one shape
def test_one_method_in_two_models_at_once(name):
    """The second model answers while the first one encodes its picture, and again between two of its layers."""
    models = llava(), llava(seed=1, layers=7)
    prompts = inputs("one", models[0], 1)[0], inputs("batch", models[1], 5)[0]
    want = []
    for model, x in zip(models, prompts, strict=True):
        with build(name)(model):
            want.append(answers(model, x))
    method, inside, second = build(name), [], []

    def interrupt(*_) -> None:
        if not inside:
            inside.append(True)
            second.append(answers(models[1], prompts[1]))
            inside.pop()

    first = models[0].model
    tower_layer = first.vision_tower.encoder.layers[-1]
    places = tower_layer, first.multi_modal_projector, first.language_model.layers[2], first.language_model.layers[5]
    with method(models[0]), method(models[1]):
        hooks = [place.register_forward_pre_hook(interrupt) for place in places]
        got = answers(models[0], prompts[0])
        for hook in hooks:
            hook.remove()
        for out in (*second, answers(models[1], prompts[1])):
            same(out, want[1])
    same(got, want[0])
    assert len(second) >= 5  # in the tower, at the projector, and twice in two layers each


@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_traces_can_be_copied_and_pickled(name, kind):
    model = llava()
    x, _ = inputs(kind, model)
    traces = []
    for _ in range(2):
        with build(name)(model) as trace:
            answers(model, x)
        traces.append(trace)
    data = pickle.dumps(traces[0])
    assert len(data) < 60_000  # no network, no states: numbers of 36 tokens
    for found in (pickle.loads(data), copy.deepcopy(traces[0]), traces[0]):
        for a, b in zip(found.prefills, traces[1].prefills, strict=True):
            assert (a.n_visual, a.n_tokens, a.entering, a.leaving) == (b.n_visual, b.n_tokens, b.entering, b.leaving)
            assert [r.tolist() for r in a.raters] == [r.tolist() for r in b.raters]
            for s, t in zip(a.stages, b.stages, strict=True):
                for count in ("layer", "tokens_in", "tokens_out", "recycled"):
                    assert getattr(s, count) == getattr(t, count)
                for what in ("kept", "origin", "scores"):
                    for i, j in zip(getattr(s, what), getattr(t, what), strict=True):
                        assert (i is None and j is None) or torch.equal(i, j)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), True, 2.5, "many", [3]])
@pytest.mark.parametrize("name", NAMES)
def test_budgets_that_are_no_number_of_tokens(name, value):
    with pytest.raises(ValueError, match="budget .* is neither an integer nor 'full'|has no budget"):
        sparsevlm.build(name.split(",")[0], budget=value)


@pytest.mark.parametrize(
    "name,option,value",
    [
        ("sparsevlm", "keep", float("inf")),
        ("sparsevlm", "keep", [9, float("inf")]),
        ("sparsevlm", "keep", True),
        ("sparsevlm", "layers", [1, True]),
        ("sparsevlm", "recycle", float("nan")),
        ("sparsevlm", "raters", True),
        ("sparsevlm_plus", "heads", float("nan")),
        ("sparsevlm_plus", "heads", float("inf")),
        ("sparsevlm_plus", "kernel_floor", float("nan")),
        ("sparsevlm_rank", "bias", float("nan")),
        ("ficoco_l", "r", float("inf")),
        ("fastv", "keep", True),
        ("random", "seed", 0.5),
        ("aim", "temperature", float("inf")),
        ("aim", "merge_to", 2.5),
        ("downsample", "side", float("nan")),
        ("pyramiddrop", "ratios", (0.5, float("nan"), 0.1)),
    ],
)
def test_options_that_are_no_numbers(name, option, value):
    with pytest.raises(ValueError, match=option.removesuffix("s")):
        sparsevlm.build(name, **{option: value})


def test_whole_numbers_may_be_written_as_floats():
    assert sparsevlm.build("random", budget=9.0, seed=3.0) == sparsevlm.build("random", budget=9, seed=3)
