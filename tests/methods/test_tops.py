"""TOPS: each stage against the paper's algorithm written out, and its token counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sparsevlm
from tests.methods.test_before_model import attentions, features
from tests.tiny import IMAGE, PATCHES, inputs, llava


def by_hand(relevance: torch.Tensor, x: torch.Tensor, count: int, lam: float, alpha: float = 0.5) -> list[int]:
    """Algorithm 1 with the sums of algorithm 2, token by token."""
    unit = F.normalize(x, dim=-1)
    cos, n = (unit @ unit.T).tolist(), len(relevance)
    chosen = [int(relevance.argmax())]
    while len(chosen) < count:
        left = [i for i in range(n) if i not in chosen]
        near = [max(cos[i][j] for j in chosen) for i in range(n)]
        r = {i: float(relevance[i]) for i in left}
        d = {i: 1 - near[i] for i in left}
        c = {i: sum(max(0.0, cos[i][j] - near[j]) for j in left) for i in left}
        mean = [sum(t.values()) / len(left) for t in (r, d, c)]
        chosen.append(max(left, key=lambda i: r[i] / mean[0] + alpha * d[i] / mean[1] + lam * c[i] / mean[2]))
    return sorted(chosen)


@pytest.mark.parametrize("lam", [None, 0.2])
def test_every_stage_by_hand(lam):
    """12 of 36 before a model of 8 layers, 6 from layer 3 and 2 from layer 6 on."""
    model = llava(impl="eager", dtype=torch.float32).requires_grad_(False)
    x, _ = inputs("one", model)
    x["pixel_values"] = x["pixel_values"].float()
    start, length = x["input_ids"][0].tolist().index(IMAGE), x["input_ids"].shape[1]
    text = length - start - PATCHES
    entered: dict[int, torch.Tensor] = {}
    layers = model.model.language_model.layers
    hooks = [
        layers[i].register_forward_pre_hook(lambda m, args, i=i: entered.update({i: args[0].double()}))
        for i in (0, 3, 6)
    ]
    with sparsevlm.build("tops", tokens=6, lam=lam)(model) as trace:
        out = model(**x, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    stages = trace.prefills[0].stages
    assert [(s.layer, s.tokens_out) for s in stages] == [(-1, [12]), (2, [6]), (5, [2])]
    states = features(model, x["pixel_values"])[0, 1:]
    projected = model.model.multi_modal_projector(states).double()
    relevance = attentions(model, x["pixel_values"])[0, :, 0, 1:].mean(0).double()
    assert stages[0].kept[0].tolist() == by_hand(relevance, projected, 12, 0.5)
    slots = list(range(12))
    for stage, layer, keep in ((stages[1], 3, 6), (stages[2], 6, 2)):
        # what enters the layer without its stage, and the attention that it would pay: from the unpruned layer
        hidden = out.hidden_states[layer]  # of the layer before, not pruned yet
        module, rotary = layers[layer].self_attn, model.model.language_model.rotary_emb
        normed = layers[layer].input_layernorm(hidden)
        cos, sin = rotary(hidden, torch.arange(hidden.shape[1])[None])
        q, k = (
            (p(normed).view(1, hidden.shape[1], -1, module.head_dim).transpose(1, 2))
            for p in (module.q_proj, module.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * module.scaling
        n = hidden.shape[1]
        rows = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)[0, :, -text:]
        visual = slice(start, start + len(slots))
        chosen = by_hand(
            rows[..., visual].mean((0, 1)).double(), hidden[0, visual].double(), keep, 1.0 if lam is None else lam
        )
        assert stage.kept[0].tolist() == chosen
        slots = [slots[i] for i in chosen]


def test_counts_of_the_paper_and_of_budgets():
    paper = {t: sparsevlm.build("tops", tokens=t).plan(576, 32) for t in (128, 64, 32)}
    assert {t: s.keep for t, s in paper.items()} == {128: (256, 128, 32), 64: (128, 64, 16), 32: (64, 32, 8)}
    assert [s.entering for s in paper.values()] == [152, 76, 38]
    for budget in (192, 128, 64, 32, 16):
        assert abs(sparsevlm.build("tops", budget=budget).plan(576, 32).leaving - budget) <= 0.5
    assert sparsevlm.build("tops", budget=500).plan(576, 32).keep[0] == 576


def test_relevance_coverage_and_diversity_have_a_say():
    model = llava(layers=8)
    x, _ = inputs("one", model)

    def kept(**options) -> list[list[int]]:
        with sparsevlm.build("tops", tokens=8, **options)(model) as trace:
            model(**x)
        return [s.kept[0].tolist() for s in trace.prefills[0].stages]

    plain = kept()
    assert kept(alpha=5.0)[0] != plain[0] and kept(lam=0.0)[1] != plain[1]


def test_without_text_behind_the_picture_only_the_first_stage_acts():
    model = llava()
    x, _ = inputs("one", model)
    with sparsevlm.build("tops", tokens=8)(model) as trace:
        model(input_ids=torch.tensor([[5, 6] + [IMAGE] * PATCHES]), pixel_values=x["pixel_values"])
    assert [s.tokens_out for s in trace.prefills[0].stages] == [[16], [16], [16]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 9, "tokens": 9}, "exclude each other"),
        ({"tokens": 0}, "at least 1"),
        ({"layers": (3,)}, "must be two"),
        ({"lam": -1.0}, "must not be negative"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build("tops", **options)
