"""Choosing among projected tokens where a family has no tower that the method could act in: a stage at the input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sparsevlm
from sparsevlm.runtime.families import RECORDS
from tests.families import IMAGE, NAMES, VIDEO, inputs, layouts, tiny
from tests.tiny import inputs as llava_inputs
from tests.tiny import llava, same


def farthest(rows: torch.Tensor, count: int) -> list[int]:
    """DivPrune, algorithm 1: the token whose nearest neighbour is farthest, then always the one farthest from all."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    everything = range(len(rows))
    chosen: list[int] = []
    while len(chosen) < count:
        pool = [i for i in everything if i not in chosen]
        others = chosen or everything
        nearest = {i: min(float(distance[i, j]) for j in others if j != i) for i in pool}
        chosen.append(max(pool, key=lambda i: nearest[i]))
    return sorted(chosen)


def runs(row: list[int]) -> list[list[int]]:
    """Places of visual tokens that follow each other."""
    out: list[list[int]] = []
    for i, token in enumerate(row):
        if token in (IMAGE, VIDEO):
            if i and row[i - 1] in (IMAGE, VIDEO):
                out[-1].append(i)
            else:
                out.append([i])
    return out


@pytest.mark.parametrize("budget", [9, 0.25])
@pytest.mark.parametrize("name", NAMES)
def test_divprune_restated_on_the_models_own_embeddings(name, budget):
    model = tiny(name)
    x, rows = inputs(name, layouts(name)[-1], model)
    entered = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**x)
        hook.remove()
        with sparsevlm.build("divprune", budget=budget)(model) as trace:
            model(**x)
    (stage,) = trace.prefills[0].stages
    for b, (row, embeds) in enumerate(zip(x["input_ids"].tolist(), entered["inputs_embeds"], strict=True)):
        pictures, want, before, spent = runs(row), [], 0, 0
        total = sum(map(len, pictures))
        for k, places in enumerate(pictures):
            if isinstance(budget, int):  # shared evenly, none of these pictures is short of it
                count = -(-(budget - spent) // (len(pictures) - k))
            else:
                count = int(budget * (before + len(places)) + 0.5) - spent
            want += [before + i for i in farthest(embeds[places], count)]
            before, spent = before + len(places), spent + count
        assert stage.kept[b].tolist() == want and before == total == stage.tokens_in[b]


@pytest.mark.parametrize("budget", [11, 0.3])
@pytest.mark.parametrize("kind", ["one", "multi", "batch", "ragged"])
def test_the_stage_is_what_the_projectors_hook_makes_on_llava(kind, budget, monkeypatch):
    model = llava()
    x, _ = llava_inputs(kind, model)
    method, out = sparsevlm.build("divprune", budget=budget), []
    for grid in (True, False):
        monkeypatch.setitem(RECORDS, "llava", replace(RECORDS["llava"], grid=grid))
        with torch.no_grad(), method(model) as trace:
            got = model.generate(**x, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
            out.append((torch.stack(got.logits), [s.kept for s in trace.prefills[0].stages], trace.prefills[0]))
    (a, kept, record), (b, also, other) = out
    same(a, b)
    assert [[k.tolist() for k in stage] for stage in kept] == [[k.tolist() for k in stage] for stage in also]
    assert record.leaving == other.leaving and record.n_visual == other.n_visual


def test_pictures_get_their_own_tokens():
    """With one budget for both pictures as if they were one, other tokens would stay."""
    model = tiny("qwen2_5_vl")
    x, _ = inputs("qwen2_5_vl", "two", model)
    with torch.no_grad(), sparsevlm.build("divprune", budget=10)(model) as trace:
        model(**x)
    kept = trace.prefills[0].stages[0].kept[0]
    assert [int((kept < 12).sum()), int((kept >= 12).sum())] == [5, 5]
