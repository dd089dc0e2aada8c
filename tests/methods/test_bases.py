"""The bases that say where and how many tokens stay; the options of every method, which name its runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest
from torch import Tensor

import sparsevlm
from sparsevlm.methods.bases import PruneAtInput, PruneByLists, PruneByRatios, PruneOnce
from sparsevlm.methods.sparsevlm import SparseVLM
from sparsevlm.runtime.stage import Stage
from tests.tiny import inputs, llava

# in this order, beside `budget`; recorded before there were bases
OPTIONS = {
    "aim": "merge_to=None, first=None, last=None, prune=True, steps=5, temperature=0.1, start='all'",
    "anchorprune": "clip=None, tokenizer=None, question=None, k_min=None, tau=0.2, patience=3, k_max=0.5",
    "atp_llava": (
        "layers=None, variant='normalised', modules=None, seed=0, shift=0.0, sampling=0.0625, spatial=True, "
        "importance='both'"
    ),
    "cdpruner": "clip=None, tokenizer=None, question=None",
    "dart": "k=None, keep=None, match='leaving', early_drop=True, visual_pivots=4, text_pivots=4",
    "divprune": "",
    "downsample": "side=None, of='picture'",
    "dynamic_llava": "k=None, keep=None, match='leaving', early_drop=True, predictor=None, gate=False, seed=0",
    "fastervlm": "",
    "fastv": "k=None, keep=None, match='leaving', early_drop=True",
    "ficoco_l": "variant='paper', start=None, r=None, beta=0.6, gamma=0.6, epsilon=0.998, positions='renumber'",
    "ficoco_v": "variant='paper', start=None, lam=0.35, eps=0.998, window=2, scaling=2.0, merge=True",
    "folder": "alpha=None",
    "folder_simple": "",
    "holov": "crops=16",
    "mmtok": "alpha=0.5, text_temperature=0.02, vision_temperature=0.2, words='keywords', sizes=None",
    "none": "",
    "pyramiddrop": "layers=None, ratios=None, match='leaving', positions='renumber'",
    "random": "seed=0",
    "random_layer": "k=None, keep=None, match='leaving', early_drop=True, layers=None, seed=0",
    "restore": "base='holov', share=0.5, anchors='code', c=2.0, calibrate=True",
    "scope": "alpha=1.0, combine='multiply'",
    "sgl": (
        "k=None, keep=None, match='leaving', early_drop=True, guide=None, answer_tokens=16, layers=None, shared=None, "
        "importance=None"
    ),
    "signpost": (
        "keep=None, first=1.5, layer=None, weights='information', temperature=0.05, named=0.5, near=1.0, radius=0.125, "
        "coverage=1.0, diversity=0.5, early_drop=True"
    ),
    "sparsevlm": (
        "layers=None, keep=None, raters='paper', recycle=0.3, cluster=0.1, merge='mean', "
        "positions='renumber', recycled_at='end', always_drop=False, early_drop=True"
    ),
    "sparsevlm_plus": (
        "layers=None, keep=None, raters='paper', recycle=0.0, cluster=0.1, merge='mean', "
        "positions='original', recycled_at='end', always_drop=False, early_drop=True, heads=0.4375, "
        "kernel=True, kernel_floor=None"
    ),
    "sparsevlm_rank": (
        "layers=None, keep=None, raters='paper', recycle=0.3, cluster=0.1, merge='mean', "
        "positions='renumber', recycled_at='end', always_drop=False, early_drop=True, rule='paper', lam=0.5, "
        "scale=13.5, bias=0.0"
    ),
    "tome": "proportional=True",
    "tops": "tokens=None, layers=None, alpha=0.5, lam=None",
    "visionzip": "dominant=None, contextual=None",
    "vispruner": "ratio=0.5, step=8",
    "vscan": "keep=None, layer=None, match='leaving'",
    "yopo": "window=None, causal_window=False, heads=None, ffn=1.0, cut=None, removal='real'",
}


@pytest.mark.parametrize("name", sparsevlm.methods())
def test_options_and_defaults_are_those_under_which_runs_are_recorded(name: str):
    options = asdict(sparsevlm.build(name))
    assert options.pop("budget") is None
    assert ", ".join(f"{option}={value!r}" for option, value in options.items()) == OPTIONS[name]


def loudest(base: type) -> type:
    """A method that has nothing but a name and a score; and the lists that one of the bases needs."""

    @dataclass(frozen=True)
    class Loudest(base):
        name: ClassVar[str] = "loudest"
        lists: ClassVar[tuple] = SparseVLM.lists

        def score(self, stage: Stage) -> Tensor:
            return stage.visual().norm(dim=-1)

    return Loudest


def run(method):
    """The trace of one prompt with 36 visual tokens in a model of six layers."""
    model = llava()
    with method(model) as trace:
        model(**inputs("one", model)[0])
    return trace.prefills[0]


@pytest.mark.parametrize("base", [PruneAtInput, PruneOnce, PruneByLists, PruneByRatios])
def test_a_score_is_enough(base: type):
    method = loudest(base)
    for budget in (12, 20):
        record = run(method(budget=budget))
        assert abs(record.leaving[0] - budget) <= 0.5
        for stage in record.stages:
            assert stage.tokens_out < stage.tokens_in
            best = stage.scores[0].argsort(descending=True)[: stage.tokens_out[0]]
            assert sorted(best.tolist()) == stage.kept[0].tolist()
    for budget in (None, "full"):
        assert not run(method(budget=budget)).stages
    record = run(method(budget=1000))  # more than the picture has
    assert record.leaving == [36] and record.clamped == [True]


@pytest.mark.parametrize(
    "base,options,stages",
    [
        (PruneAtInput, {"budget": 9}, [(-1, 9)]),
        (PruneOnce, {"k": 3, "keep": 9}, [(2, 9)]),
        (PruneByLists, {"layers": (0, 2), "keep": (9, 4)}, [(0, 9), (2, 4)]),
        (PruneByRatios, {"layers": (0, 2), "ratios": (0.5, 0.25)}, None),
    ],
    ids=str,
)
def test_where_and_how_many_are_as_given(base: type, options: dict, stages: list | None):
    record = run(loudest(base)(**options))
    n = record.n_visual[0]
    stages = [(0, n // 2), (2, n // 4)] if stages is None else stages
    assert [(s.layer, s.tokens_out[0]) for s in record.stages] == stages


@pytest.mark.parametrize(
    "base,options",
    [(PruneOnce, {"keep": 3}), (PruneByLists, {"keep": (3, 2, 1)}), (PruneByRatios, {"ratios": (0.5,)})],
    ids=str,
)
def test_a_budget_and_what_replaces_it_exclude_each_other(base: type, options: dict):
    with pytest.raises(ValueError, match=f"budget and {next(iter(options))} exclude each other. Use one of them"):
        loudest(base)(budget=12, **options)


@dataclass(frozen=True)
class AboveMean(PruneByLists):
    """Keeps the tokens whose embeddings are larger than the mean one: how many depends on the picture."""

    name: ClassVar[str] = "above_mean"
    adaptive: ClassVar[bool] = True

    def score(self, stage: Stage) -> Tensor:
        stage.prefill.scratch["norm"] = norm = stage.visual().norm(dim=-1)
        return norm

    def keep_counts(self, stage: Stage) -> list[int]:
        norm = stage.prefill.scratch["norm"]
        return (norm > norm.mean(1, keepdim=True)).sum(1).tolist()


def test_without_published_lists_a_budget_is_refused():
    @dataclass(frozen=True)
    class Bare(PruneByLists):
        name: ClassVar[str] = "bare"

    Bare(keep=(3, 2, 1))
    with pytest.raises(ValueError, match="bare has no published lists .* Use keep"):
        Bare(budget=12)


def test_an_adaptive_method_needs_no_more_than_its_counts():
    record = run(AboveMean(layers=(1, 3)))
    count = record.n_visual[0]
    assert [s.layer for s in record.stages] == [1, 3]
    for stage in record.stages:
        scores = stage.scores[0]
        assert stage.tokens_in == [count] and stage.recycled == [0]
        assert stage.kept[0].tolist() == (scores > scores.mean()).nonzero()[:, 0].tolist()
        count = stage.tokens_out[0]
        assert count == len(stage.kept[0])
    assert not run(AboveMean(layers=(1, 3), budget="full")).stages
    with pytest.raises(ValueError, match="above_mean has no budget .got 12."):
        AboveMean(budget=12)
