"""The timing harness: what it attributes to what, and how it compares settings."""

import time

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import sparsevlm
from sparsevlm.cost import harness
from sparsevlm.cost.clocks import Mark, WallClock, cpu_ms
from sparsevlm.cost.harness import Harness
from sparsevlm.cost.latency import measure
from sparsevlm.cost.shapes import make_prompt
from sparsevlm.methods.sparsevlm import SparseVLM
from tests import tiny

SETTINGS = [("random", 12, {}), ("none", "full", {}), ("sparsevlm", 12, {"raters": "all"})]
SLOW = 0.1  # seconds; far above what the tiny model takes, also on a busy machine


@pytest.fixture(scope="module")
def model():
    return tiny.llava(dtype=torch.float32)


class StandingClock(WallClock):
    """A clock that only `spend` moves, and by a microsecond each look at it: no time is nothing to divide by."""

    def __init__(self):
        self.now = 0.0

    def mark(self) -> Mark:
        self.now += 1e-6
        return Mark(self.now, self.now)

    def spend(self, *_) -> None:
        self.now += SLOW

    def spent(self, original):
        """The same function, which takes SLOW seconds."""
        return lambda *args, **kwargs: (self.spend(), original(*args, **kwargs))[1]


@pytest.fixture
def clock(monkeypatch):
    """The harness's clock."""
    clock = StandingClock()
    monkeypatch.setattr(harness, "clock_for", lambda device: clock)
    return clock


def ticks(times: int):
    """So many times SLOW, in seconds, and the looks at the clock."""
    return pytest.approx(times * SLOW, abs=1e-3)


def test_rows_say_what_was_measured(model):
    rows = measure(model, SETTINGS, text_tokens=14, batch_size=2, repeats=3, warmup=1, decode_tokens=2)
    assert [(r["method"], r["budget"]) for r in rows] == [("random", 12), ("none", "full"), ("sparsevlm", 12)]
    assert rows[2]["options"]["raters"] == "all" and "budget" not in rows[2]["options"]
    for row in rows:
        assert (row["batch_size"], row["text_tokens"], row["visual_tokens"]) == (2, 14, tiny.PATCHES)
        for name, times in row["rounds"].items():
            assert len(times) == 3 and min(times) > 0
            assert row[name]["median"] == np.median(times)
            assert row[name]["q25"] <= row[name]["median"] <= row[name]["q75"]
        ratios = np.divide(row["rounds"]["prefill_ms"], rows[1]["rounds"]["prefill_ms"])
        assert row["prefill_ratio"]["median"] == pytest.approx(np.median(ratios))
        spent = [row["rounds"][f"{name}_ms"] for name in ("vision", "prefill", "decode", "end_to_end")]
        for vision, prefill, decode, total in zip(*spent, strict=True):
            assert total == pytest.approx(vision + prefill + 2 * decode)
        assert row["rounds"]["first_token_ms"] == pytest.approx([v + p for v, p in zip(*spent[:2], strict=True)])
        ratios = np.divide(row["rounds"]["first_token_ms"], rows[1]["rounds"]["first_token_ms"])
        assert row["first_token_ratio"]["median"] == pytest.approx(np.median(ratios))
    for row in (rows[0], rows[2]):
        ratios = np.divide(row["rounds"]["prefill_ms"], row["rounds"]["floor_ms"])
        assert row["overhead"]["median"] == pytest.approx(np.median(ratios))
        ratios = np.divide(row["rounds"]["prefill_cpu_ms"], row["rounds"]["floor_cpu_ms"])
        assert row["overhead_cpu"]["median"] == pytest.approx(np.median(ratios))
    assert rows[1]["floor_ms"] is None and rows[1]["overhead"] is None and rows[1]["parts_ms"] == {}
    assert rows[0]["entering"] == rows[0]["leaving"] == 12
    assert rows[1]["entering"] == tiny.PATCHES
    assert rows[2]["leaving"] == pytest.approx(12, abs=0.5) and rows[2]["entering"] > rows[2]["leaving"]
    assert {"raters", "scores", "selection", "recycling", "gathering", "masks"} <= set(rows[2]["parts_ms"])


def test_the_unpruned_model_is_always_measured(model):
    rows = measure(model, [("random", 12, {})], text_tokens=14, repeats=1, warmup=0, decode_tokens=1)
    assert [r["method"] for r in rows] == ["none", "random"]
    assert rows[0]["prefill_ratio"] == {"median": 1.0, "q25": 1.0, "q75": 1.0}


def test_every_setting_once_per_round_in_rotating_order(model, monkeypatch):
    order, rounds = [], []
    original = Harness._sample

    def spy(self, i, **kwargs):
        order.append(self.pruners[i].name)
        return original(self, i, **kwargs)

    monkeypatch.setattr(Harness, "_sample", spy)
    settings = [("none", "full", {}), ("random", 12, {}), ("sparsevlm", 12, {})]
    rows = measure(model, settings, 14, repeats=2, warmup=1, decode_tokens=1, progress=lambda *r: rounds.append(r))
    names = [s[0] for s in settings]
    assert [order[i : i + 3] for i in (0, 3, 6)] == [names, names[1:] + names[:1], names[2:] + names[:2]]
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    assert all(len(r["rounds"]["prefill_ms"]) == 2 for r in rows)  # the warm-up is not kept


def test_pruned_and_floor_take_turns_in_being_first(model, monkeypatch):
    seen, cuts = [], []
    original, least = Harness._time, harness.floor
    monkeypatch.setattr(Harness, "_time", lambda self, c, n: (seen.append(n), original(self, c, n))[1])
    monkeypatch.setattr(harness, "floor", lambda net, lengths: (cuts.append(lengths), least(net, lengths))[1])
    prompt = make_prompt(model.config, 14, dtype=model.dtype)
    timed = Harness(model, [("sparsevlm", None, {"layers": (1, 4), "keep": (9, 3), "recycle": 0})], prompt, 1)
    for number in (0, 1):
        samples, failed = timed.round(number, [1])
        assert not failed and samples[1].floor > 0 and samples[1].unpruned == samples[0].prefill
    assert seen == [1, 1, 0, 0, 1, 1]  # unpruned; pruned, floor | the second round begins with the pruned setting
    assert cuts == [{2: 14 + 9, 5: 14 + 3}] * 2


def test_a_slow_part_shows_where_it_is_and_nowhere_else(model, monkeypatch, clock):
    def seconds(method: str) -> dict:
        rows = measure(model, [("none", "full", {}), (method, 12, {})], 14, repeats=1, warmup=0, decode_tokens=2)
        row = rows[1]
        times = {part: row[f"{part}_ms"]["median"] / 1000 for part in ("prefill", "vision", "decode", "floor")}
        return times | {name: part["median"] / 1000 for name, part in row["parts_ms"].items()}

    assert max(seconds("sparsevlm").values()) == ticks(0)
    slow = {"scores": "score", "recycling": "merge_tokens", "raters": "begin"}
    for name, member in slow.items():
        with monkeypatch.context() as patch:
            patch.setattr(SparseVLM, member, clock.spent(getattr(SparseVLM, member)))
            found = seconds("sparsevlm")
        times = 1 if name == "raters" else 3  # three pruning layers
        assert found.pop(name) == ticks(times) and found.pop("prefill") == ticks(times), name
        assert max(found.values()) == ticks(0), name
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        inner = next(m for m in part.modules() if not list(m.children()))
        hook = inner.register_forward_pre_hook(clock.spend)
        found = seconds("random")
        hook.remove()
        assert found.pop("vision") == ticks(1) and max(found.values()) == ticks(0)


@pytest.mark.parametrize(
    ("method", "where"),
    [("divprune", "reduce"), ("vispruner", "reduce"), ("tome", "block"), ("folder", "encode"), ("aim", "_group")],
)
def test_what_a_vision_method_computes_is_in_its_prefill_and_its_own_part(model, monkeypatch, clock, method, where):
    """Wherever it does it: in the tower (tome), before the projector (folder, vispruner, aim), after it (divprune)."""
    kind, calls = type(sparsevlm.build(method, budget=8)), []
    original = clock.spent(getattr(kind, where))
    monkeypatch.setattr(kind, where, lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1])
    x = make_prompt(model.config, 14, dtype=model.dtype)
    with sparsevlm.build(method, budget=8)(model), torch.no_grad():
        model(**x.inputs)
    times = len(calls)
    row = measure(model, [("none", "full", {}), (method, 8, {})], 14, repeats=1, warmup=1, decode_tokens=1)[1]
    for name in ("prefill_ms", "method_ms", "first_token_ms"):
        assert row[name]["median"] / 1000 == ticks(times) != 0, name
    assert row["parts_ms"]["pictures"]["median"] / 1000 == ticks(times)
    assert max(row[name]["median"] for name in ("vision_ms", "decode_ms", "floor_ms")) / 1000 == ticks(0)


@pytest.mark.parametrize("method", ["tome", "ficoco_v", "downsample"])
def test_what_the_tower_computes_for_a_vision_method_is_the_towers(model, clock, method):
    """Also where the method has the tower's modules compute its tokens."""
    layer = model.model.vision_tower.encoder.layers[0]
    hook = layer.mlp.register_forward_pre_hook(clock.spend)
    row = measure(model, [("none", "full", {}), (method, 8, {})], 14, repeats=1, warmup=0, decode_tokens=1)[1]
    hook.remove()
    times = 1 if method == "downsample" else 2  # the others compute the block, and then call it with one token
    assert row["vision_ms"]["median"] / 1000 == ticks(times)
    assert max(row[name]["median"] for name in ("prefill_ms", "method_ms", "decode_ms")) / 1000 == ticks(0)


def test_decode_is_per_token(model):
    def slow_step(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            time.sleep(SLOW)

    hook = model.register_forward_pre_hook(slow_step, with_kwargs=True)
    (row,) = measure(model, [("none", "full", {})], 14, repeats=2, warmup=0, decode_tokens=3)
    hook.remove()
    assert SLOW <= row["decode_ms"]["median"] / 1000 < 2 * SLOW and row["prefill_ms"]["median"] / 1000 < SLOW
    assert row["end_to_end_ms"]["median"] / 1000 >= 3 * SLOW


def test_cpu_time_is_the_operating_systems(model):
    """Sleeping takes time and no CPU time; computing takes both."""
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(SLOW))
    (row,) = measure(model, [("none", "full", {})], 14, repeats=2, warmup=1, decode_tokens=1)
    hook.remove()
    assert row["prefill_ms"]["median"] / 1000 > SLOW > row["prefill_cpu_ms"]["median"] / 1000
    clock = WallClock()

    def compute(*_):
        start = time.process_time()
        while time.process_time() < start + SLOW:
            pass

    hook = next(m for m in model.model.vision_tower.modules() if not list(m.children()))
    hook = hook.register_forward_pre_hook(compute)
    (row,) = measure(model, [("none", "full", {})], 14, repeats=2, warmup=0, decode_tokens=1)
    hook.remove()
    assert row["vision_ms"]["median"] / 1000 > SLOW > row["prefill_cpu_ms"]["median"] / 1000
    start = clock.mark()
    compute()
    end = clock.mark()
    assert clock.elapsed_ms(start, end) >= cpu_ms(start, end) * 0.99 >= 0.99 * SLOW * 1000


def test_the_model_is_left_as_it_was(model):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    measure(model, [("sparsevlm", 12, {})], 14, repeats=1, warmup=0, decode_tokens=1)
    assert hooks() == before
    with pytest.raises(ValueError, match="do not fit a model of"):
        measure(model, [("fastv", 12, {"k": 40})], 14, repeats=1)
    assert hooks() == before


def test_video_and_text_models_are_timed():
    video = tiny.video_llava(dtype=torch.float32)
    (row,) = measure(video, [("none", "full", {})], 14, repeats=1, warmup=0, decode_tokens=1)
    assert row["visual_tokens"] == 8 * 17 and row["vision_ms"]["median"] > 0
    text = LlamaForCausalLM(tiny.text_config()).eval()
    rows = measure(text, [("sparsevlm", 64, {})], 14, repeats=1, warmup=0, decode_tokens=1)
    assert rows[1]["visual_tokens"] == 576 and rows[1]["leaving"] == pytest.approx(64, abs=0.5)
    assert rows[1]["vision_ms"]["median"] == 0 and rows[1]["lengths"][-1] < rows[0]["lengths"][-1] == 590


def test_an_adaptive_method_is_timed_and_not_counted(model):
    rows = measure(model, [("sparsevlm_rank", None, {"lam": 0.5})], 14, repeats=1, warmup=0, decode_tokens=1)
    assert rows[1]["gmacs"] is None and rows[0]["gmacs"] > 0
    assert rows[1]["overhead"] is not None and rows[1]["entering"] < rows[0]["entering"]


def test_models_are_loaded_by_name():
    (row,) = measure("mini", [("none", "full", {})], 12, repeats=1, warmup=0, decode_tokens=1, device="cpu")
    assert row["visual_tokens"] == 576


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}, {"decode_tokens": 0}, {"batch_size": 0}])
def test_wrong_numbers_are_refused(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        measure(model, SETTINGS, **{"text_tokens": 14, **wrong})


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear"):
        measure(torch.nn.Linear(2, 2), SETTINGS, 14)
    with pytest.raises(ValueError, match="unknown method"):
        measure(tiny.llava(dtype=torch.float32), [("sparsvlm", 12, {})], 14)
    assert "sparsevlm" in sparsevlm.methods()


def test_what_does_not_fit_is_said(model, monkeypatch):
    def fail(self, i, **kwargs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Harness, "_sample", fail)
    with pytest.raises(RuntimeError, match="out of memory: none, random"):
        measure(model, [("random", 12, {})], 14, repeats=1)


@pytest.mark.gpu
def test_device_time_on_a_gpu(model):
    rows = measure(model, SETTINGS, text_tokens=14, repeats=3, device="cuda")
    model.to("cpu")
    assert all(r["prefill_ms"]["median"] > 0 for r in rows)
    assert sum(part["median"] for part in rows[2]["parts_ms"].values()) > 0
