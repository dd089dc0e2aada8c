"""YOPO's saving, recounted by hand: it is the language model's, and the masked form has none."""

from __future__ import annotations

import numpy as np
import pytest

from sparsevlm.cost import flops
from tests.cost.test_own_work import HEADS, KV, LAYERS, MLP, TEXT, VOCAB, WIDTH, D, L, N, count, layer_macs, model  # noqa: F401

BEFORE, SIDE = TEXT // 3, 6  # tokens of text before the picture
HEAD = D * VOCAB


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> str:
    """Layer 2 keeps heads 0 and 1, which share a key head; layer 4 none."""
    mask = np.ones((LAYERS, HEADS), bool)
    mask[2, 2:] = mask[4] = False
    np.save(path := tmp_path_factory.mktemp("heads") / "heads.npy", mask)
    return str(path)


def prefill(model: str, options: dict, budget=None) -> float:  # noqa: F811
    found = count(model, "yopo", budget, options)
    assert found["method"] == 0
    return found["llm_prefill"] * 1e9


def test_masked_costs_what_the_unpruned_model_costs(model, heads):  # noqa: F811
    options = {"heads": heads, "ffn": 0.5, "window": 3, "cut": 3, "removal": "masked"}
    assert prefill(model, options) == pytest.approx(LAYERS * layer_macs(L) + HEAD, abs=1e-3)
    assert count(model, "yopo", None, options)["vision"] == count(model, "none", "full", {})["vision"]


def test_the_cut_leaves_text_alone_and_the_layer_before_it_makes_keys_and_values_only(model):  # noqa: F811
    last = L * 2 * D * KV + TEXT * (2 * D * D + 3 * D * MLP) + 2 * TEXT * L * D
    want = 2 * layer_macs(L) + last + 3 * layer_macs(TEXT) + HEAD
    assert prefill(model, {"cut": 3}) == pytest.approx(want, abs=1e-3)
    plain = 3 * layer_macs(L) + 3 * layer_macs(TEXT) - 3 * N * 3 * D * MLP // 2 + HEAD
    assert prefill(model, {"cut": 3, "ffn": 0.5}) == pytest.approx(plain, abs=1e-3)


def test_ffn_is_sliced(model):  # noqa: F811
    saved = LAYERS * N * 3 * D * (MLP - MLP // 4)
    assert prefill(model, {"ffn": 0.25}) == pytest.approx(LAYERS * layer_macs(L) - saved + HEAD, abs=1e-3)


def test_removed_heads_have_no_projections_and_no_scores_of_visual_tokens(model, heads):  # noqa: F811
    pairs = L * L - TEXT * TEXT  # that a removed head has not
    half = N * (2 * D * 2 * WIDTH + 2 * D * KV // 2) + 2 * pairs * 2 * WIDTH  # two of four heads, one of two key heads
    whole = N * (2 * D * D + 2 * D * KV) + 2 * pairs * D
    assert prefill(model, {"heads": heads}) == pytest.approx(LAYERS * layer_macs(L) - half - whole + HEAD, abs=1e-3)


def test_a_window_costs_the_rows_of_the_grid_within_reach(model):  # noqa: F811
    saved = 2 * D * N * (L - BEFORE - 3 * SIDE)
    want = LAYERS * (layer_macs(L) - saved) + HEAD
    assert prefill(model, {"window": 3}) == pytest.approx(want, abs=1e-3)
    assert prefill(model, {"window": 7}) == pytest.approx(LAYERS * layer_macs(L) + HEAD, abs=1e-3)  # band = picture


@pytest.mark.parametrize("budget", [9, 27])
def test_a_budget_costs_what_plain_pruning_costs_to_half_a_layer(model, budget):  # noqa: F811
    plain = count(model, "random", budget, {})["llm_prefill"] * 1e9
    cross = 4 * TEXT * N * D  # products of text with the picture in a layer, which the budget's count leaves out
    assert abs(prefill(model, {}, budget) - plain) <= (layer_macs(L) - layer_macs(TEXT)) / 2 + cross


def test_a_budget_of_llava_7b():
    counted, plain = (flops.run("llava-1.5-7b", method, 128, 118) for method in ("yopo", "random"))
    assert counted.entering == 576 * 8 / 32  # the last of the 8 layers makes keys and values only
    assert flops.prefill_gmacs(counted.gmacs) == pytest.approx(flops.prefill_gmacs(plain.gmacs), rel=0.03)
