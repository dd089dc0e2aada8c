"""The timing harness: what it attributes to what, and how it compares settings."""

import time

import numpy as np
import pytest
import torch

import sparsevlm
from sparsevlm.cost import latency
from sparsevlm.cost.latency import measure
from sparsevlm.methods.sparsevlm import SparseVLM
from tests import tiny

SETTINGS = [("random", 12, {}), ("none", "full", {}), ("sparsevlm", 12, {"raters": "all"})]
SLOW = 0.1  # seconds; far above what the tiny model takes, also on a busy machine


@pytest.fixture(scope="module")
def model():
    return tiny.llava(dtype=torch.float32)


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
    assert rows[0]["entering"] == rows[0]["leaving"] == 12
    assert rows[1]["entering"] == tiny.PATCHES
    assert rows[2]["leaving"] == pytest.approx(12, abs=0.5) and rows[2]["entering"] > rows[2]["leaving"]


def test_the_unpruned_model_is_always_measured(model):
    rows = measure(model, [("random", 12, {})], text_tokens=14, repeats=1, warmup=0, decode_tokens=1)
    assert [r["method"] for r in rows] == ["none", "random"]
    assert rows[0]["prefill_ratio"] == {"median": 1.0, "q25": 1.0, "q75": 1.0}


def test_every_setting_once_per_round_in_rotating_order(model, monkeypatch):
    order, rounds = [], []
    original = latency._time_once

    def spy(net, pruner, *args):
        order.append(pruner.name)
        return original(net, pruner, *args)

    monkeypatch.setattr(latency, "_time_once", spy)
    settings = [("none", "full", {}), ("random", 12, {}), ("sparsevlm", 12, {})]
    rows = measure(model, settings, 14, repeats=2, warmup=1, decode_tokens=1, progress=lambda *r: rounds.append(r))
    names = [s[0] for s in settings]
    assert [order[i : i + 3] for i in (0, 3, 6)] == [names, names[1:] + names[:1], names[2:] + names[:2]]
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    assert all(len(r["rounds"]["prefill_ms"]) == 2 for r in rows)  # the warm-up is not kept


def test_a_slow_part_shows_where_it_is_and_nowhere_else(model, monkeypatch):
    def medians(method: str) -> list[float]:
        rows = measure(model, [("none", "full", {}), (method, 12, {})], 14, repeats=3, warmup=1, decode_tokens=2)
        return [rows[1][part]["median"] / 1000 for part in ("prefill_ms", "vision_ms", "decode_ms")]

    assert max(medians("sparsevlm")) < SLOW
    original = SparseVLM.score
    with monkeypatch.context() as patch:
        patch.setattr(SparseVLM, "score", lambda self, stage: (time.sleep(SLOW), original(self, stage))[1])
        prefill, vision, decode = medians("sparsevlm")
    assert prefill >= 3 * SLOW and vision < SLOW and decode < SLOW  # three pruning layers
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        inner = next(m for m in part.modules() if not list(m.children()))
        hook = inner.register_forward_pre_hook(lambda *_: time.sleep(SLOW))
        prefill, vision, decode = medians("random")
        hook.remove()
        assert vision >= SLOW and prefill < SLOW and decode < SLOW


def test_decode_is_per_token(model):
    def slow_step(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            time.sleep(SLOW)

    hook = model.register_forward_pre_hook(slow_step, with_kwargs=True)
    (row,) = measure(model, [("none", "full", {})], 14, repeats=2, warmup=0, decode_tokens=3)
    hook.remove()
    assert SLOW <= row["decode_ms"]["median"] / 1000 < 2 * SLOW and row["prefill_ms"]["median"] / 1000 < SLOW


def test_the_model_is_left_as_it_was(model):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    measure(model, [("sparsevlm", 12, {})], 14, repeats=1, warmup=0, decode_tokens=1)
    assert hooks() == before
    with pytest.raises(ValueError, match="37 is above the 36 visual tokens"):
        measure(model, [("sparsevlm", 37, {})], 14, repeats=1)
    assert hooks() == before


def test_video_models_are_timed():
    video = tiny.video_llava(dtype=torch.float32)
    (row,) = measure(video, [("none", "full", {})], 14, repeats=1, warmup=0, decode_tokens=1)
    assert row["visual_tokens"] == 8 * 17 and row["vision_ms"]["median"] > 0


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


@pytest.mark.gpu
def test_device_time_on_a_gpu(model):
    rows = measure(model, SETTINGS, text_tokens=14, repeats=3, device="cuda")
    assert all(r["prefill_ms"]["median"] > 0 for r in rows)
