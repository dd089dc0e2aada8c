"""Every method on every model: what must hold whatever a method computes.

A new method needs one line in METHODS; what is behind a comma in a key tells variants of a method apart.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sparsevlm
from sparsevlm.runtime.families import locate
from tests.methods.adapters import NAMES, Adapter, adapter
from tests.tiny import llava, logits, same


@dataclass
class Row:
    """How a method is tested.

    Attributes:
        options: what it is built with; with a budget, the mean tokens reached must be within half a token of it.
        full: options that keep every token.
        refuses: adapters that it cannot work on: entering it there must raise ValueError with this text.
    """

    options: dict = field(default_factory=lambda: {"budget": 12})
    full: dict = field(default_factory=lambda: {"budget": "full"})
    refuses: dict[str, str] = field(default_factory=dict)


NO_TOWER = {"text": "acts in the vision tower"}
UNTRAINED = {"predictor": "untrained", "budget": "full"}
SMALL = llava(layers=2, seed=5)
METHODS = {
    "aim": Row({"budget": 7}, refuses=NO_TOWER),
    "aim, kept": Row({"budget": 7, "start": "kept"}, refuses=NO_TOWER),
    "anchorprune": Row(refuses=dict.fromkeys(NAMES, "text tower of the CLIP model") | NO_TOWER),
    "atp_llava": Row({"modules": "untrained"}, {"modules": "untrained", "budget": "full"}),
    "atp_llava, port": Row(
        {"modules": "untrained", "variant": "port"}, {"modules": "untrained", "variant": "port", "shift": -1e9}
    ),
    "cdpruner": Row(refuses=dict.fromkeys(NAMES, "text tower of the CLIP model") | NO_TOWER),
    "dart": Row(),
    "divprune": Row(),
    "downsample": Row({"side": 2}, refuses=NO_TOWER),
    "dynamic_llava": Row({"predictor": "untrained", "budget": 12}, UNTRAINED),
    "dynamic_llava, gate": Row({"predictor": "untrained", "budget": 12, "gate": True, "seed": 2}, UNTRAINED),
    "fastervlm": Row(refuses=NO_TOWER),
    "fastv": Row(),
    "ficoco_l": Row(),
    "ficoco_l, code": Row({"variant": "code", "budget": 12}, {"variant": "code", "budget": "full"}),
    "ficoco_v": Row(refuses=NO_TOWER),
    "ficoco_v, code": Row(  # a tower of one block halves at most: one of the prompts has two pictures
        {"variant": "code", "budget": 36},
        {"variant": "code", "budget": "full"},
        NO_TOWER | {"video_llava": "cannot bring 16 down"},
    ),
    "folder": Row(refuses=NO_TOWER),
    "folder_simple": Row(refuses=NO_TOWER),
    "holov": Row(refuses=NO_TOWER),
    "mmtok": Row({"words": "all", "budget": 12}, {"words": "all", "budget": "full"}, NO_TOWER),
    "none": Row(options={}, full={"budget": 12}),
    "pyramiddrop": Row(),
    "random": Row(),
    "random_layer": Row(),
    "restore": Row(refuses=NO_TOWER),
    "restore, plain": Row({"base": "divprune", "calibrate": False, "budget": 12}, refuses=NO_TOWER),
    "scope": Row(refuses=NO_TOWER),
    "sgl": Row({"guide": "self", "layers": 2, "answer_tokens": 3, "budget": 12}, {"guide": "self", "budget": "full"}),
    "sgl, guide": Row(
        {"guide": SMALL, "answer_tokens": 3, "budget": 12},
        {"guide": SMALL, "budget": "full"},
        {"video_llava": "the guide has another vocabulary", "text": "which a guide with weights of its own"},
    ),
    "signpost": Row(),
    "sparsevlm": Row(),
    "sparsevlm, prior": Row({"budget": 12, "raters": "prior"}, {"budget": "full", "raters": "prior"}),
    "sparsevlm_plus": Row({"budget": 12, "kernel_floor": 0.1}),
    "sparsevlm_rank": Row({"layers": (1, 3, 5), "lam": 0.9}, {"layers": (1, 3, 5), "lam": 0.0}),
    "tome": Row(refuses=NO_TOWER),
    "visionzip": Row(refuses=NO_TOWER),
    "tops": Row(refuses=NO_TOWER),
    "vispruner": Row(refuses=NO_TOWER),
    "vscan": Row(refuses=NO_TOWER),
    "yopo": Row({"cut": 3}),
    "yopo, without cut": Row({"heads": "heads", "ffn": 0.5}),
    "yopo, masked": Row({"heads": "heads", "ffn": 0.5, "cut": 3, "removal": "masked"}),
    "yopo, windows": Row({"window": 3, "heads": "heads", "cut": 6}, refuses={"video_llava": "form a square grid"}),
}
CONFIGS = Path(__file__).parents[2] / "configs" / "method"
CASES = [(m, a) for m, a in product(METHODS, NAMES) if a not in METHODS[m].refuses]
REFUSALS = [(m, a) for m in METHODS for a in METHODS[m].refuses]


@cache
def heads_file() -> str:
    """The file that stands for "heads": layers of 4 heads, one of which keeps none."""
    kept = np.random.RandomState(1).rand(8, 4) < 0.5
    kept[0], kept[4] = True, False
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    np.save(path := Path(folder, "heads.npy"), kept)
    return str(path)


def build(name: str, full: bool = False, **options):
    options = (METHODS[name].full if full else METHODS[name].options) | options
    if options.get("heads") == "heads":
        options = options | {"heads": heads_file()}
    return sparsevlm.build(name.split(",")[0], **options)


@dataclass
class Case:
    """A method on a model, and what both of its tests look at: one answer to the batch."""

    name: str
    model: str

    @cached_property
    def adapter(self) -> Adapter:
        return adapter(self.model)

    @cached_property
    def method(self):
        return build(self.name)

    @cached_property
    def answered(self):
        """What generate() returns, and the record of its prefill."""
        with self.adapter.install(self.method) as trace:
            out = self.adapter.generate()
        (record,) = trace.prefills
        return out, record


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> Case:
    return Case(*request.param)


def hooks_of(model) -> int:
    parts = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, p)) for m in model.modules() for p in parts)


def entering(stages: list, n_visual: int, b: int, layer: int) -> int:
    """Visual tokens of sample b that enter a layer, as the trace has it."""
    return [n_visual, *(s.tokens_out[b] for s in stages if s.layer < layer)][-1]


def assert_same_records(one, many, b: int, offset: int) -> None:
    """The record of a prompt by itself equals that of row b of a batch, where it comes `offset` columns later."""
    assert one.leaving[0] == many.leaving[b] and one.entering[0] == many.entering[b]
    for layer in range(one.n_layers):
        assert entering(one.stages, one.n_visual[0], 0, layer) == entering(many.stages, many.n_visual[b], b, layer)
    stages = {s.layer: s for s in many.stages}
    for stage in one.stages:
        other = stages[stage.layer]
        assert torch.equal(stage.kept[0], other.kept[b]) and torch.equal(stage.origin[0], other.origin[b])
        assert stage.recycled[0] == other.recycled[b]
        if stage.scores[0] is not None:
            same(stage.scores[0], other.scores[b], 1e-6)  # those of SparseVLM+ come from float32 tables
    if one.raters:
        assert torch.equal(one.raters[0] + offset, many.raters[b])


def test_every_method_is_here():
    assert {name.split(",")[0] for name in METHODS} == set(sparsevlm.methods())


@pytest.mark.parametrize("name", sparsevlm.methods())
def test_yaml_lists_every_option_with_its_default(name: str):
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert options.pop("name") == name
    method = sparsevlm.build(name)
    assert sorted(options) == sorted(f.name for f in fields(method) if f.init and f.name != "budget")
    assert sparsevlm.build(name, **options) == method


def test_full_budget_is_the_model_itself_bit_for_bit(case: Case):
    a = case.adapter
    want = a.unpruned
    a.model(**a.batch, output_hidden_states=True)  # transformers installs hooks of its own at the first such call
    hooks, attributes = hooks_of(a.model), set(vars(a.model))
    with a.install(build(case.name, full=True)) as trace:
        assert torch.equal(logits(a.generate()), want)
    for record in trace.prefills:
        assert record.entering == record.leaving == record.n_visual
    assert hooks_of(a.model) == hooks and set(vars(a.model)) == attributes
    assert torch.equal(logits(a.generate(max_new_tokens=1)), want[:, :1])


def test_batch_equals_singles_and_cache_equals_no_cache(case: Case):
    a, method = case.adapter, case.method
    out, together = case.answered
    with a.install(method):
        again = a.generate(max_new_tokens=1)
        free = a.generate(use_cache=False)
    assert torch.equal(logits(out)[:, :1], logits(again))  # deterministic
    same(logits(out), logits(free))
    length = max(a.n_tokens)
    for b, count in enumerate(a.n_visual):
        arguments, mask = a.row(b)
        with a.install(method, mask) as trace:
            alone = a.generate(arguments)
        same(logits(alone)[0], logits(out)[b])
        if count:
            assert_same_records(trace.prefills[0], together, b, length - a.n_tokens[b])
    if case.name != "none":
        assert not torch.allclose(a.unpruned[:, 0], logits(out)[:, 0])


def test_tokens_are_exactly_as_planned_and_the_cache_is_really_shorter(case: Case):
    a, method = case.adapter, case.method
    out, record = case.answered
    assert record.n_visual == a.n_visual
    n_layers = record.n_layers
    if not method.adaptive:
        attached = method.attach(locate(a.model))  # which knows how many tokens a picture has
        plans = [method.schedule(n, n_layers, attached) for n in a.n_visual if n]
        assert [p.leaving for p in plans] == [x for x, n in zip(record.leaving, a.n_visual, strict=True) if n]
        assert [p.entering for p in plans] == [x for x, n in zip(record.entering, a.n_visual, strict=True) if n]
    if method.budget is not None and case.name != "none":
        assert all(abs(x - method.budget) <= 0.5 for x, n in zip(record.leaving, a.n_visual, strict=True) if n)
    generated = out.logits and len(out.logits) - 1  # the last token is never fed
    for layer in range(n_layers):
        held = [
            t - n + entering(record.stages, n, b, layer)
            for b, (t, n) in enumerate(zip(a.n_tokens, a.n_visual, strict=True))
        ]
        assert out.past_key_values.layers[layer].keys.shape[2] == max(held) + generated, layer


@pytest.mark.parametrize("name,model", REFUSALS)
def test_refusals(name: str, model: str):
    a: Adapter = adapter(model)
    with pytest.raises(ValueError, match=METHODS[name].refuses[model]), a.install(build(name)):
        a.generate()
