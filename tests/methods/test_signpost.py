"""Signpost against a restatement in plain Python, and what becomes of it when a part is taken away."""

from __future__ import annotations

import math

import pytest
import torch

import sparsevlm
from tests.tiny import IMAGE, inputs, llava

KEEP = (12, 5)


def run(model, x, **options):
    with sparsevlm.build("signpost", **options)(model) as trace:
        model(**x)
    return [stage.origin[0].tolist() for stage in trace.prefills[0].stages]


def entering(model, x) -> torch.Tensor:
    """Embeddings of the one prompt [L, D] as they enter the language model."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**x)
    hook.remove()
    return seen["inputs_embeds"][0].detach()


def cosines(a: torch.Tensor, b: torch.Tensor) -> list[list[float]]:
    return [[float(torch.dot(x, y) / x.norm() / y.norm()) for y in b] for x in a]


def covered(visual: torch.Tensor, words: torch.Tensor, count: int, grid: int, information: bool = True) -> list[int]:
    """The first stage, word by word and token by token."""
    n, told = len(visual), [0.0] * len(visual)
    total = 0.0
    for row in cosines(words, visual):
        parts = [math.exp(c / 0.05) for c in row]
        places = [p / sum(parts) for p in parts]
        weight = sum(p * math.log(p * n) for p in places) if information else 1.0
        total += weight
        told = [t + weight * p for t, p in zip(told, places, strict=True)]
    told = [n * t / total for t in told]
    radius = int(grid / 8 + 0.5)
    near = [math.exp(-((d * 1.5 / max(radius, 1)) ** 2) / 2) for d in range(radius + 1)]
    norm = (near[0] + 2 * sum(near[1:])) ** 2
    u = []
    for i in range(n):
        around = 0.0
        for j in range(n):
            down, across = abs(i // grid - j // grid), abs(i % grid - j % grid)
            if max(down, across) <= radius:
                around += near[down] * near[across] * told[j] / norm
        u.append(1 + 0.5 * told[i] + around)
    similar, best, chosen = cosines(visual, visual), [0.0] * n, []
    for _ in range(count):
        gains = {
            i: sum(u[v] * max(0.0, similar[v][i] - best[v]) for v in range(n)) for i in range(n) if i not in chosen
        }
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
        best = [max(b, similar[v][chosen[-1]]) for v, b in enumerate(best)]
    return sorted(chosen)


@pytest.mark.parametrize("weights", ["information", "equal"])
def test_first_stage_covers_what_the_words_point_at(weights: str):
    model = llava()
    x, _ = inputs("one", model)
    ids, embeddings = x["input_ids"][0], entering(model, x)
    places = (ids == IMAGE).nonzero()[:, 0]
    words = embeddings[places[-1] + 1 :]
    grid = math.isqrt(len(places))
    want = covered(embeddings[places], words, KEEP[0], grid, weights == "information")
    assert run(model, x, keep=KEEP, weights=weights)[0] == want
    assert want != covered(embeddings[places], words, KEEP[0], grid, weights != "information")


def test_second_stage_is_attention_alone_without_coverage_and_diversity():
    """As SparseVLM rated by all words, at the same layer, of what the first stage has left."""
    model = llava()
    x, _ = inputs("one", model)
    everything = (x["input_ids"][0] == IMAGE).sum().item()
    ours = run(model, x, keep=(everything, 7), layer=2, coverage=0, diversity=0)
    with sparsevlm.build("sparsevlm", raters="all", recycle=0, layers=(2,), keep=(7,))(model) as trace:
        model(**x)
    assert ours[-1] == trace.prefills[0].stages[0].origin[0].tolist()
    assert run(model, x, keep=(everything, 7), layer=2)[-1] != ours[-1]


def test_choices_nest_and_words_neighbours_and_both_stages_matter():
    model = llava()
    x, _ = inputs("one", model)
    first, second = run(model, x, keep=KEEP)
    assert len(first) == KEEP[0] and len(second) == KEEP[1] and set(second) < set(first)
    assert set(run(model, x, keep=(7, 5))[0]) < set(first)
    changed = {"weights": "none", "named": 20.0, "near": 20.0, "temperature": 0.5}
    for option, value in changed.items():
        assert run(model, x, keep=KEEP, **{option: value})[0] != first, option
    near = {"near": 20.0}
    assert run(model, x, keep=KEEP, **near, radius=0.0)[0] != run(model, x, keep=KEEP, **near, radius=0.4)[0]


@pytest.mark.parametrize("budget,keep", ((192, (288, 123)), (64, (96, 41)), (32, (48, 20)), (16, (24, 10))))
def test_budget_is_the_mean_as_layers_are_left(budget: int, keep: tuple[int, int]):
    """12 layers: five are left with 1.5 T tokens, seven with the second count; at most half a token is left over."""
    plan = sparsevlm.build("signpost", budget=budget).plan(576, 12)
    assert plan.layers == (-1, 5) and plan.keep == keep
    assert budget - 0.5 <= (5 * keep[0] + 7 * keep[1]) / 12 <= budget
    assert sparsevlm.build("signpost", budget=64).plan(576, 32).layers == (-1, 15)


def test_wrong_options_are_refused():
    for options, message in (
        ({"keep": (3,)}, "two counts"),
        ({"budget": 3, "keep": (3, 2)}, "exclude each other"),
        ({"first": 0.5}, "at least 1"),
        ({"temperature": 0}, "must be positive"),
        ({"near": -1}, "must not be negative"),
        ({"weights": "all"}, "known: information, equal, none"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsevlm.build("signpost", **options)
