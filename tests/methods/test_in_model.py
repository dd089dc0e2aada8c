"""Methods that act inside the language model: independent restatements, every way of generating, ablations."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import sparsevlm
from sparsevlm.methods import ficoco_l
from tests.tiny import GENERATE, IMAGE, SUPPRESS, inputs, llava, logits, prompt, same, single

METHODS = {
    "dart": {"k": 2, "keep": 12},
    "fastv": {"k": 2, "keep": 12},
    "ficoco_l": {"start": 1, "r": 6},
    "pyramiddrop": {"layers": (1, 3, 5), "ratios": (0.5, 0.25, 0.125)},
    "random_layer": {"k": 2, "keep": 12},
}


def build(name: str, **options):
    return sparsevlm.build(name, **(METHODS[name] | options))


def result(name: str, model, x, **options):
    """Record and logits of the last prompt token."""
    with build(name, **options)(model) as trace, torch.no_grad():
        out = model(**x)
    return trace.prefills[0], out.logits[:, -1]


class Plain:
    """What the unpruned model computes for a prompt by itself: attentions, states, rotated keys."""

    def __init__(self, model, x):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = model(**x, output_attentions=True, output_hidden_states=True, use_cache=True)
        model.set_attn_implementation("sdpa")
        self.attention = [a[0].double() for a in out.attentions]  # [H, L, L] per layer
        self.states = [h[0].double() for h in out.hidden_states]  # what enters each layer; the last one is normed
        self.keys = [layer.keys[0].double() for layer in out.past_key_values.layers]  # [H_kv, L, d]
        self.visual = (x["input_ids"][0] == IMAGE).nonzero()[:, 0]
        self.text = torch.arange(int(self.visual[-1]) + 1, x["input_ids"].shape[1])


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def plain(request):
    """A model in float32, one prompt, and what it computes unpruned."""
    model = llava(request.param, dtype=torch.float32)
    x, _ = inputs("one", model, seed=4)
    return model, x, Plain(model, x)


# ---- independent restatements --------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 2, 5])
def test_fastv_keeps_what_the_last_token_attends_to(plain, k):
    model, x, p = plain
    record, _ = result("fastv", model, x, k=k)
    want = p.attention[k - 1][:, -1, p.visual].mean(0)
    same(record.stages[0].scores[0].double(), want, 1e-5)
    assert record.stages[0].kept[0].tolist() == want.topk(12).indices.sort().values.tolist()


def dart_by_hand(model, p: Plain, k: int, keep: int, n_visual: int = 4, n_text: int = 4) -> list[int]:
    size = p.keys[k - 1].abs().sum((0, 2))
    best = [i.tolist() for i in (size[p.visual].topk(n_visual).indices, size[p.text].topk(n_text).indices)]
    pivots = [int(p.visual[i]) for i in sorted(best[0])] + [int(p.text[i]) for i in sorted(best[1])]
    normed = model.model.language_model.norm(p.states[k].to(model.dtype)).double()
    kept, free = set(best[0]), [i for i in range(len(p.visual)) if i not in best[0]]
    for j, pivot in enumerate(pivots):
        share = (keep - n_visual) // len(pivots) + (j < (keep - n_visual) % len(pivots))
        alike = torch.cosine_similarity(normed[pivot][None], normed[p.visual[free]], dim=-1)
        new = [free[i] for i in alike.topk(share, largest=False).indices]
        kept, free = kept | set(new), [i for i in free if i not in new]
    return sorted(kept)


@pytest.mark.parametrize("k,keep", [(1, 12), (2, 20), (4, 23)])
def test_dart_keeps_what_is_least_like_the_pivots(plain, k, keep):
    model, x, p = plain
    record, _ = result("dart", model, x, k=k, keep=keep)
    assert record.stages[0].kept[0].tolist() == dart_by_hand(model, p, k, keep)


def ficoco_by_hand(p: Plain, layer: int, r: int, epsilon: float) -> tuple[list[int], Tensor, Tensor]:
    """Kept tokens, redundancy, and the visual states after folding the discarded ones into them."""
    beta = gamma = 0.6
    a = p.attention[layer].mean(0)
    n = len(p.visual)
    redundancy = torch.zeros(n)
    for i in range(n):
        mutual = sum(a[p.visual[i], p.visual[j]] for j in range(n)) / n
        asked = sum(a[k, p.visual[i]] for k in p.text) / len(p.text)
        redundancy[i] = beta * mutual - (1 - beta) * asked
    discarded = redundancy.topk(r).indices.tolist()
    kept = [i for i in range(n) if i not in discarded]
    old = p.states[layer + 1][p.visual]
    total, weight = old.clone(), torch.ones(n, dtype=old.dtype)
    for i in discarded:
        c = torch.tensor(
            [
                gamma * a[p.visual[i], p.visual[j]]
                + (1 - gamma) * sum(a[k, p.visual[i]] * a[k, p.visual[j]] for k in p.text)
                for j in kept
            ]
        )
        targets = c >= torch.quantile(c, epsilon)
        for j, value in zip([j for j, t in zip(kept, targets, strict=True) if t], c[targets], strict=True):
            total[j] += value / c[targets].sum() * old[i]
            weight[j] += value / c[targets].sum()
    return kept, redundancy, (total / weight[:, None])[kept]


@pytest.mark.parametrize("layer,epsilon", [(0, 0.998), (2, 0.998), (2, 0.5), (3, 0.0)])
def test_ficoco_l_folds_discarded_tokens_into_correlated_ones(plain, layer, epsilon):
    model, x, p = plain
    entered = {}
    with build("ficoco_l", start=layer, r=9, epsilon=epsilon)(model) as trace, torch.no_grad():
        handle = model.model.language_model.layers[layer + 1].register_forward_pre_hook(
            lambda module, args, kwargs: entered.update(states=args[0]), with_kwargs=True
        )
        model(**x)
        handle.remove()
    kept, redundancy, states = ficoco_by_hand(p, layer, 9, epsilon)
    stage = trace.prefills[0].stages[0]
    same(-stage.scores[0].double(), redundancy.double(), 1e-5)
    assert stage.kept[0].tolist() == kept
    start = int(p.visual[0])
    same(entered["states"][0, start : start + len(kept)].double(), states, 2e-4)


def test_random_layer_is_random_at_fastv_layer():
    model = llava()
    x, _ = inputs("one", model)
    at_input, _ = result("random_layer", model, x)
    with sparsevlm.build("random", budget=12)(model) as trace:
        model(**x)
    assert torch.equal(at_input.stages[0].kept[0], trace.prefills[0].stages[0].kept[0])  # the same draw
    assert at_input.stages[0].layer == 1
    kept = {tuple(result("random_layer", model, x, seed=s)[0].stages[0].kept[0].tolist()) for s in range(5)}
    assert len(kept) == 5


# ---- ablations: each method's own defining part matters ------------------------------------------------------------
ABLATIONS = {
    "fastv: the last token's attention": ("fastv", {}, "random_layer", {}),
    "fastv: the layer": ("fastv", {"keep": 12}, "fastv", {"k": 5}),
    "dart: pivots of the text": ("dart", {}, "dart", {"text_pivots": 0}),
    "dart: pivots of the picture": ("dart", {}, "dart", {"visual_pivots": 1}),
    "pyramiddrop: stages": ("pyramiddrop", {}, "pyramiddrop", {"layers": (1,), "ratios": (0.25,)}),
    "pyramiddrop: positions": ("pyramiddrop", {}, "pyramiddrop", {"positions": "original"}),
    "ficoco_l: the text's part in filtering": ("ficoco_l", {}, "ficoco_l", {"beta": 1.0}),
    "ficoco_l: the visual part in filtering": ("ficoco_l", {}, "ficoco_l", {"beta": 0.0}),
    "ficoco_l: direct correlation": ("ficoco_l", {}, "ficoco_l", {"gamma": 0.0}),
    "ficoco_l: correlation by text": ("ficoco_l", {"epsilon": 0.5}, "ficoco_l", {"epsilon": 0.5, "gamma": 1.0}),
    "ficoco_l: few targets": ("ficoco_l", {}, "ficoco_l", {"epsilon": 0.0}),
    "ficoco_l: positions": ("ficoco_l", {}, "ficoco_l", {"positions": "original"}),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablation(case):
    name, options, other, others = ABLATIONS[case]
    model = llava()
    x, _ = inputs("one", model)
    _, a = result(name, model, x, **options)
    _, b = result(other, model, x, **others)
    assert not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_ablation_pyramiddrop_scores_with_the_next_layer(monkeypatch):
    model = llava()
    x, _ = inputs("one", model)
    a, _ = result("pyramiddrop", model, x)
    monkeypatch.setattr(type(build("pyramiddrop")), "scores_next", False)
    b, _ = result("pyramiddrop", model, x)
    assert not torch.equal(a.stages[0].kept[0], b.stages[0].kept[0])


def test_ablation_ficoco_l_keeps_what_it_discards(monkeypatch):
    model = llava()
    x, _ = inputs("one", model)
    record, folded = result("ficoco_l", model, x)
    monkeypatch.setattr(ficoco_l, "fold_weights", lambda correlation, *_: torch.zeros_like(correlation))
    dropped_record, dropped = result("ficoco_l", model, x)
    assert torch.equal(record.stages[0].kept[0], dropped_record.stages[0].kept[0])
    assert not torch.allclose(folded, dropped, rtol=1e-3, atol=1e-3)


# ---- every way of generating ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_right_padding_equals_left_padding(name):
    model = llava()
    left, rows = inputs("ragged", model)
    right, _ = inputs("ragged", model, side="right")
    with build(name)(model), torch.no_grad():
        a, b = (model(**x, position_ids=(x["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits for x in (left, right))
    for i, row in enumerate(rows):
        same(a[i, -1], b[i, len(row) - 1])


@pytest.mark.parametrize("name", METHODS)
def test_backends_agree(name):
    sdpa, eager = (llava(impl=i, dtype=torch.float32) for i in ("sdpa", "eager"))
    x, _ = inputs("batch", sdpa)
    a, want = result(name, sdpa, x)
    b, got = result(name, eager, x)
    same(got, want)
    for i in range(3):
        assert torch.equal(a.stages[-1].origin[i], b.stages[-1].origin[i])


@pytest.mark.parametrize("name", METHODS)
def test_beams_prompt_lookup_and_static_cache(name):
    model = llava()
    x, rows = inputs("batch", model)
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SUPPRESS}
    with build(name)(model):
        beams = model.generate(**x, **options, num_beams=3)
        assert torch.equal(beams, model.generate(**x, **options, num_beams=3, use_cache=False))
        assert torch.equal(beams[1, -5:], model.generate(**single(x, rows, 1), **options, num_beams=3)[0, -5:])
        dynamic = model.generate(**x, **GENERATE)
        same(logits(dynamic), logits(model.generate(**x, **GENERATE, cache_implementation="static")), 1e-5)
        one = single(x, rows, 0)
        one["input_ids"][0, -4:] = one["input_ids"][0, -8:-4]
        options["max_new_tokens"] = 12
        want = model.generate(**one, **options)
        assert torch.equal(want, model.generate(**one, **options, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("name", METHODS)
def test_assisted_decoding(name):
    model, assistant = llava(), llava(seed=1)
    x, _ = inputs("one", model)
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": SUPPRESS}
    with build(name)(model) as trace:
        want = model.generate(**x, **options)
        assert torch.equal(want, model.generate(**x, **options, assistant_model=assistant))
    first, second = trace.prefills
    for a, b in zip(first.stages, second.stages, strict=True):
        assert torch.equal(a.kept[0], b.kept[0])


@pytest.mark.parametrize("name", METHODS)
def test_second_turn_with_a_new_image_batch_equals_singles(name):
    model = llava()
    x, rows = inputs("batch", model)
    torch.manual_seed(4)
    turn = torch.tensor([prompt([3, "I", 6]) for _ in range(3)])
    pixels = torch.randn(3, 3, 42, 42, dtype=model.dtype)

    def chat(x, turn, pixels):
        first = model.generate(**x, **GENERATE)
        ids = torch.cat([first.sequences, turn], 1)
        new = x["attention_mask"].new_ones(len(ids), ids.shape[1] - x["input_ids"].shape[1])
        mask = torch.cat([x["attention_mask"], new], 1)
        return model.generate(
            input_ids=ids[:, -turn.shape[1] - 1 :],
            attention_mask=mask,
            pixel_values=pixels,
            past_key_values=first.past_key_values,
            **GENERATE,
        )

    with build(name)(model) as trace:
        together = chat(x, turn, pixels)
        second = trace.prefills[1]
        for b in range(3):
            trace.clear()
            alone = chat(single(x, rows, b), turn[b : b + 1], pixels[b : b + 1])
            same(logits(together)[b], logits(alone)[0])
            for a, t in zip(trace.prefills[1].stages, second.stages, strict=True):
                same(a.scores[0], t.scores[b])


@pytest.mark.parametrize("name,dtype", list(product(METHODS, [torch.bfloat16, torch.float16])))
def test_half_precision(name, dtype):
    model = llava(dtype=torch.float32).to(dtype)
    x, _ = inputs("ragged", model)
    with build(name)(model) as trace:
        out = model.generate(**x, max_new_tokens=3, suppress_tokens=SUPPRESS)
    assert out.shape[1] == x["input_ids"].shape[1] + 3
    assert all(s.dtype == torch.float32 for s in trace.prefills[0].stages[0].scores if s is not None)


# ---- budgets -------------------------------------------------------------------------------------------------------
def test_the_paper_s_fastv_row():
    for option in ({}, {"k": 3}, {"k": 2, "match": "entering"}):
        kept = [sparsevlm.build("fastv", budget=b, **option).plan(576, 32).keep[0] for b in (192, 128, 64)]
        assert kept == [166, 98, 30]
    assert sparsevlm.build("fastv", budget=64).plan(576, 32).layers == (2,)
    assert sparsevlm.build("fastv", budget=64).plan(576, 12).layers == (1,)


def test_pyramiddrop_layers():
    layers = {b: sparsevlm.build("pyramiddrop", budget=b).plan(576, 32).layers for b in (192, 128, 64, 10)}
    assert layers == {192: (7, 15, 23), 128: (1, 7, 15), 64: (1, 7, 15), 10: (0, 7, 15)}
    author = sparsevlm.build("pyramiddrop", layers=(1, 7, 15), budget=64, match="entering").plan(576, 32)
    assert math.isclose(author.keep[0] / 576, 0.19, abs_tol=0.005)  # the authors' lambda
    published = sparsevlm.build("pyramiddrop", ratios=(0.5, 0.25, 0.125)).plan(576, 32)
    assert published.layers == (7, 15, 23) and published.keep == (288, 144, 72)
    uneven = sparsevlm.build("pyramiddrop", ratios=(0.3, 0.2, 0.001)).plan(576, 32)
    assert uneven.keep == (172, 115, 1)  # int(172.8), int(115.2), and never none


def test_ficoco_l_budgets():
    assert sparsevlm.build("ficoco_l", start=5, r=112).plan(576, 32).leaving == pytest.approx(128, abs=0.2)
    first = {b: sparsevlm.build("ficoco_l", budget=b).plan(576, 32).layers[0] for b in (192, 128, 64)}
    assert first == {192: 4, 128: 4, 64: 2}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n_visual,n_layers", [(576, 32), (576, 12), (576, 40), (2056, 32), (36, 8), (7, 3), (1, 2)])
def test_any_budget_is_met_within_half_a_token(name, n_visual, n_layers):
    for budget in {*range(1, min(n_visual, 40) + 1), *range(41, n_visual, 61), n_visual}:
        plan = sparsevlm.build(name, budget=budget).plan(n_visual, n_layers)
        assert abs(plan.leaving - budget) <= 0.5, budget
    assert sparsevlm.build(name, budget=n_visual).plan(n_visual, n_layers).leaving == n_visual


ERRORS = [
    ("fastv", {"k": 3, "budget": 30}, "out of reach of k=3"),
    ("fastv", {"k": 1, "budget": 10, "match": "entering"}, "out of reach"),
    ("fastv", {"k": 32, "keep": 3}, "do not fit a model of 32 layers"),
    ("pyramiddrop", {"layers": (7, 15, 23), "budget": 64}, "at least 126.8"),
    ("pyramiddrop", {"layers": (7, 7), "budget": 200}, "ascend"),
    ("ficoco_l", {"start": 4, "budget": 64}, "at least 72.9"),
    ("dart", {"k": 3, "budget": 30}, "out of reach of k=3"),
]
WRONG = [
    ("fastv", {"k": 0, "keep": 5}, "k 0"),
    ("fastv", {"k": 2, "keep": 0}, "keep 0"),
    ("fastv", {"keep": 3, "budget": 5}, "exclude each other"),
    ("fastv", {"match": "both"}, "leaving, entering"),
    ("fastv", {"k": 2.5}, "integers"),
    ("pyramiddrop", {"ratios": (0.5, 0.6, 0.1)}, "not rising"),
    ("pyramiddrop", {"ratios": (0.5, 0.25)}, "differ in length"),
    ("pyramiddrop", {"ratios": (0.5, 0.25, 0.1), "budget": 5}, "exclude each other"),
    ("pyramiddrop", {"positions": "new"}, "renumber, original"),
    ("ficoco_l", {"beta": 2}, "between 0 and 1"),
    ("ficoco_l", {"r": 3, "budget": 5}, "exclude each other"),
    ("ficoco_l", {"r": -1}, "at least 0"),
    ("dart", {"visual_pivots": 0}, "at least 1"),
]


@pytest.mark.parametrize("name,options,message", ERRORS)
def test_a_budget_that_cannot_be_met_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build(name, **options).plan(576, 32)


@pytest.mark.parametrize("name,options,message", WRONG)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build(name, **options)


@pytest.mark.parametrize(
    "name,options", [("fastv", {"k": 8}), ("pyramiddrop", {"layers": (7,)}), ("ficoco_l", {"start": 7})]
)
def test_layers_that_do_not_fit_are_refused_before_anything_runs(name, options):
    model = llava()
    with pytest.raises(ValueError, match="do not fit a model of 8 layers"), sparsevlm.build(name, **options)(model):
        raise AssertionError("entered")


def test_fewer_text_tokens_than_pivots():
    model = llava()
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 42, 42, dtype=model.dtype)
    for text in (0, 1, 2):
        ids = torch.tensor([prompt([5, "I", text])])
        with build("dart")(model) as trace, torch.no_grad():
            model(input_ids=ids, pixel_values=pixels)
        assert len(trace.prefills[0].stages[0].kept[0]) == 12


def test_a_prompt_without_text_after_the_image():
    model = llava()
    torch.manual_seed(0)
    x = {
        "input_ids": torch.tensor([prompt([5, "I"])]),
        "pixel_values": torch.randn(1, 3, 42, 42, dtype=model.dtype),
    }
    plain = model(**x).logits
    for name in METHODS:
        with build(name)(model) as trace, torch.no_grad():
            out = model(**x).logits
        if name in ("dart", "random_layer"):  # need no text
            assert trace.prefills[0].stages[-1].tokens_out == [12]
        else:  # nobody there to rate them
            assert torch.equal(out, plain) and not trace.prefills
