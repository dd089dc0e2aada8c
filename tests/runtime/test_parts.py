"""Time of a pruned prefill by part, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sparsevlm
from sparsevlm.runtime import parts, prefill, rows, stage
from sparsevlm.runtime.parts import PARTS, collect, part
from tests.tiny import EARLY_DROP, inputs, llava


class FakeClock:
    """Stands still unless somebody waits."""

    def __init__(self):
        self.now = 0.0
        self.waited = 0

    def mark(self) -> float:
        return self.now

    def elapsed_ms(self, start: float, end: float) -> float:
        assert self.waited, "read before the device was waited for"
        return end - start

    def wait(self) -> None:
        self.waited += 1

    def slowed(self, function: Callable, ms: float) -> Callable:
        def slow(*args, **kwargs):
            self.now += ms
            return function(*args, **kwargs)

        return slow


def test_an_inner_part_takes_its_time_from_the_outer_one():
    clock = FakeClock()
    with collect(clock) as seconds:
        clock.now += 1
        with part("gathering"):
            clock.now += 2
            with part("masks"):
                clock.now += 4
            with part(None):
                clock.now += 8
            clock.now += 16
        clock.now += 32
        with part("masks"):
            clock.now += 64
        assert not seconds
    assert seconds == pytest.approx({"gathering": 0.018, "masks": 0.068})


def test_collecting_ends_with_the_block_also_after_an_error():
    with pytest.raises(KeyError), collect(FakeClock()), part("scores"):
        raise KeyError
    assert part("scores") is part("masks")  # nothing is made where nobody collects
    with collect(FakeClock()), pytest.raises(RuntimeError, match="already"), collect(FakeClock()):
        pass
    assert parts._watcher is None


def slowdowns(method) -> dict[str, tuple[object, str]]:
    """Where each part is done: an object and the name of its function."""
    return {
        "raters": (type(method), "begin"),
        "scores": (stage, "attention_rows"),
        "selection": (prefill, "rank_by_score"),
        "recycling": (type(method), "merge_tokens"),
        "gathering": (rows.Block, "merge"),
        "masks": (prefill, "extended"),
    }


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("name", [*PARTS[3:], None])
@torch.no_grad()
def test_a_slowdown_shows_in_its_part_only(name, options, monkeypatch):
    model, clock = llava(layers=6), FakeClock()
    x, _ = inputs("one", model)
    method = sparsevlm.build("sparsevlm", layers=(1, 3), keep=(18, 7), **options)
    if name is None:  # the layer's own work, done early
        projection = model.model.language_model.layers[1].self_attn.k_proj
        monkeypatch.setattr(projection, "forward", clock.slowed(projection.forward, 5))
    else:
        where, function = slowdowns(method)[name]
        monkeypatch.setattr(where, function, clock.slowed(getattr(where, function), 5))
    with method(model), collect(clock) as seconds:
        model(**x)
    assert {*seconds} <= {*PARTS}
    assert {key for key, value in seconds.items() if value} == ({name} - {None})


@pytest.mark.parametrize("options", EARLY_DROP)
@torch.no_grad()
def test_every_part_occurs(options):
    model, clock = llava(layers=6), FakeClock()
    x, _ = inputs("one", model)
    with sparsevlm.build("sparsevlm", layers=(1, 3), keep=(18, 7), **options)(model), collect(clock) as seconds:
        model(**x)
    assert {*seconds} == {*PARTS} - {"guide", "pictures"}


@pytest.mark.parametrize(
    ("method", "where"),
    [("divprune", "reduce"), ("vispruner", "reduce"), ("tome", "block"), ("aim", "_group")],
)
@torch.no_grad()
def test_work_in_the_tower_or_at_the_projector_is_the_methods(method, where, monkeypatch):
    """And the layers that compute its tokens are the tower's."""
    model, clock = llava(layers=6), FakeClock()
    x, _ = inputs("one", model)
    method = sparsevlm.build(method, budget=8)
    monkeypatch.setattr(type(method), where, clock.slowed(getattr(type(method), where), 5))
    layer = model.model.vision_tower.encoder.layers[0]
    monkeypatch.setattr(layer.mlp, "forward", clock.slowed(layer.mlp.forward, 100))
    with method(model), collect(clock) as seconds:
        model(**x)
    assert {key: value for key, value in seconds.items() if value} == {"pictures": 0.005}


@torch.no_grad()
def test_what_is_computed_twice_is_the_methods():
    """PyramidDrop scores by keys of the next layer, which computes them again; FastV's are handed on."""
    for name, options, own in (
        ("fastv", {"k": 2, "keep": 9}, 0),
        ("pyramiddrop", {"layers": (1,), "ratios": (0.5,)}, 5),
    ):
        model, clock = llava(layers=6), FakeClock()
        x, _ = inputs("one", model)
        scored = model.model.language_model.layers[1 if name == "fastv" else 2].self_attn.k_proj
        scored.forward = clock.slowed(scored.forward, 5)
        with sparsevlm.build(name, **options)(model), collect(clock) as seconds:
            model(**x)
        assert seconds["scores"] == pytest.approx(own / 1000), name
