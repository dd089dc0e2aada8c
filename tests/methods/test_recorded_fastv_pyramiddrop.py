"""FastV and PyramidDrop against recorded runs of their authors' own code (tests/goldens/peers).

The recordings are of transformers forks, run unedited on tiny random Llamas in float32, batch 1: FastV's
`fastv_forward` (llava-hf/transformers, d165972), PyramidDrop's modeling_llama_pdrop.py (6444f30), and a plain Llama.
FastV's port in lmms-eval (`fastv_lmms`) caches the layer before the cut twice; ours, and its answers, are unaffected.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from tests.goldens import load
from tests.goldens.load import files, recording, stem
from tests.tiny import EARLY_DROP

SCORES, LOGITS = 1e-5, 5e-5
pytestmark = pytest.mark.recordings


@torch.no_grad()
def run(meta: dict, method, steps: int, **options):
    """Records, cache lengths after the prompt, greedy ids [steps] and their logits [steps, vocabulary]."""
    model = load.llama(meta["config"], meta["seed"])
    embeds, visual = load.prompt(meta["config"], meta["seed"], meta["pre"], meta["n_vis"], meta["n_text"])
    with method(model, visual_mask=visual) as trace:
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    cached = []
    if out.past_key_values is not None:
        cached = [layer.keys.shape[2] - (steps - 1) for layer in out.past_key_values.layers]
    return trace.prefills[0], cached, out.sequences[0].tolist(), torch.cat(out.logits).numpy()


def assert_scores(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=SCORES * want.max())


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("path", files("peers", "fastv_*.npz"), ids=stem)
def test_fastv(path: Path, options: dict):
    meta, want = recording(path)
    generated = "cache_gen" if "cache_gen_ids" in want else "gen"  # the fork also records answers without a cache
    want_cached = want["kv_len"].tolist()
    if "lmms" in meta["source"]:
        want_cached[meta["K"] - 1] //= 2
    keep = meta.get("keep") or round(meta["n_vis"] * (1 - meta["r"]))
    method = sparsevlm.build("fastv", k=meta["K"], keep=keep, **options)
    record, cached, ids, logits = run(meta, method, len(want[f"{generated}_ids"]))
    (stage,) = record.stages
    assert stage.layer == meta["K"] - 1
    assert_scores(stage.scores[0], want["scores"])
    assert stage.kept[0].tolist() == stage.origin[0].tolist() == want["keep_visual"].tolist()
    assert cached == want_cached
    assert ids == want[f"{generated}_ids"].tolist()
    np.testing.assert_allclose(logits, want[f"{generated}_logits"], rtol=0, atol=LOGITS)
    assert record.raters[0].tolist() == [meta["pre"] + meta["n_vis"] + meta["n_text"] - 1]


@pytest.mark.parametrize("path", files("peers", "pdrop_*.npz"), ids=stem)
def test_pyramiddrop(path: Path):
    meta, want = recording(path)
    layers = [layer - 1 for layer in meta["layer_list"]]
    method = sparsevlm.build("pyramiddrop", layers=layers, ratios=meta["ratios"][1:])
    record, cached, ids, logits = run(meta, method, len(want["gen_ids"]))
    assert [stage.layer for stage in record.stages] == layers
    for j, stage in enumerate(record.stages):
        assert_scores(stage.scores[0], want[f"p{j}_scores"])
        assert stage.kept[0].tolist() == want[f"p{j}_keep_local"].tolist()
        assert stage.origin[0].tolist() == want[f"p{j}_keep_origin"].tolist()
    assert cached == want["kv_len"].tolist()
    assert ids == want["gen_ids"].tolist()
    np.testing.assert_allclose(logits, want["gen_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("method", ["none", "fastv", "pyramiddrop"])
@pytest.mark.parametrize("path", files("peers", "vanilla_*.npz"), ids=stem)
def test_unpruned(path: Path, method: str):
    meta, want = recording(path)
    method = sparsevlm.build(method, budget="full")
    _, _, ids, logits = run(meta, method, len(want["gen_ids"]))
    assert ids == want["gen_ids"].tolist()
    np.testing.assert_allclose(logits, want["gen_logits"], rtol=0, atol=LOGITS)
