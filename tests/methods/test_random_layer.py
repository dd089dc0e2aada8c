"""The matched control: random tokens in SparseVLM's place differ from it in the choice of tokens only."""

from __future__ import annotations

import pytest
import torch

import sparsevlm
from sparsevlm.cost import flops
from sparsevlm.methods.random_layer import RandomLayer
from sparsevlm.methods.sparsevlm import SparseVLM
from tests.tiny import inputs, llava

EXPLICIT = {"layers": (1, 3), "keep": (18, 7)}


def run(model, x, name: str, **options):
    with sparsevlm.build(name, **options)(model) as trace:
        return model(**x).logits, trace.prefills[0]


@pytest.mark.parametrize(
    "options", [{"budget": 12}, {"budget": 20}, EXPLICIT, {**EXPLICIT, "early_drop": False}], ids=str
)
def test_counts_are_sparsevlms_and_tokens_are_not(options):
    model = llava()
    x, _ = inputs("one", model)
    out, theirs = run(model, x, "sparsevlm", **options)
    ours = [run(model, x, "random_layer", match="sparsevlm", seed=seed, **options) for seed in range(3)]
    for other, control in ours:
        assert (control.entering, control.leaving) == (theirs.entering, theirs.leaving)
        for mine, stage in zip(control.stages, theirs.stages, strict=True):
            assert (mine.layer, mine.tokens_in, mine.tokens_out) == (stage.layer, stage.tokens_in, stage.tokens_out)
            assert mine.recycled == stage.recycled
        assert not torch.equal(other, out)
    assert len({tuple(control.stages[0].kept[0].tolist()) for _, control in ours}) == 3


@pytest.mark.parametrize("options", [{"budget": 12}, EXPLICIT], ids=str)
def test_with_sparsevlms_scores_it_is_sparsevlm(options, monkeypatch):
    model = llava()
    x, _ = inputs("one", model)
    expected, _ = run(model, x, "sparsevlm", **options)
    monkeypatch.setattr(RandomLayer, "raters", "paper", raising=False)
    monkeypatch.setattr(RandomLayer, "begin", SparseVLM.begin)
    monkeypatch.setattr(RandomLayer, "score", SparseVLM.score)
    found, _ = run(model, x, "random_layer", match="sparsevlm", **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("model", "budget"),
    [("llama-64x12", 192), ("llama-64x12", 64), *(pytest.param("mini", b, marks=pytest.mark.slow) for b in (192, 64))],
)
def test_the_model_computes_as_much_as_for_sparsevlm(model, budget):
    theirs, ours = (
        flops.run(model, name, budget, 12, **options)
        for name, options in (("sparsevlm", {}), ("random_layer", {"match": "sparsevlm"}))
    )
    assert (ours.entering, ours.leaving, ours.lengths) == (theirs.entering, theirs.leaving, theirs.lengths)
    own = {part: theirs.gmacs[part] - ours.gmacs[part] for part in flops.PARTS}
    choosing = own.pop("method")  # raters and their rows; merging is the same
    assert own == pytest.approx(dict.fromkeys(own, 0.0), abs=1e-12)
    assert 0 < choosing < 0.02 * theirs.gmacs["llm_prefill"]


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="Use k"):
        sparsevlm.build("random_layer", budget=12, layers=(1,))
    with pytest.raises(ValueError, match="Use layers"):
        sparsevlm.build("random_layer", budget=12, match="sparsevlm", k=2)
    with pytest.raises(ValueError, match="differ in length"):
        sparsevlm.build("random_layer", match="sparsevlm", layers=(1, 2), keep=(5,))
    with pytest.raises(ValueError, match="match 'sparsvlm' is unknown"):
        sparsevlm.build("random_layer", budget=12, match="sparsvlm")
