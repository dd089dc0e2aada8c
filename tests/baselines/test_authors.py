"""FastV and PyramidDrop against recorded runs of their authors' own code (tests/goldens/peers).

The recordings are of transformers forks, run unedited on tiny random Llamas in float32, batch 1: FastV's
`fastv_forward` (llava-hf/transformers, d165972), PyramidDrop's modeling_llama_pdrop.py (6444f30), and a plain Llama.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from tests.goldens import load
from tests.tiny import EARLY_DROP

FOLDER = Path(load.__file__).parent / "peers"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
SCORES, LOGITS = 1e-5, 5e-5


def recordings(start: str) -> list[str]:
    return [name for name in NAMES if name.startswith(start)]


def read(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


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
@pytest.mark.parametrize("name", recordings("fastv_hf"))
def test_fastv(name: str, options: dict):
    meta, want = read(name)
    keep = round(meta["n_vis"] * (1 - meta["r"]))
    method = sparsevlm.build("fastv", k=meta["K"], keep=keep, **options)
    record, cached, ids, logits = run(meta, method, len(want["cache_gen_ids"]))
    (stage,) = record.stages
    assert stage.layer == meta["K"] - 1
    assert_scores(stage.scores[0], want["scores"])
    assert stage.kept[0].tolist() == stage.origin[0].tolist() == want["keep_visual"].tolist()
    assert cached == want["kv_len"].tolist()
    assert ids == want["cache_gen_ids"].tolist()
    np.testing.assert_allclose(logits, want["cache_gen_logits"], rtol=0, atol=LOGITS)
    assert record.raters[0].tolist() == [meta["pre"] + meta["n_vis"] + meta["n_text"] - 1]


@pytest.mark.parametrize("name", recordings("pdrop"))
def test_pyramiddrop(name: str):
    meta, want = read(name)
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
@pytest.mark.parametrize("name", recordings("vanilla"))
def test_unpruned(name: str, method: str):
    meta, want = read(name)
    method = sparsevlm.build(method, budget="full")
    _, _, ids, logits = run(meta, method, len(want["gen_ids"]))
    assert ids == want["gen_ids"].tolist()
    np.testing.assert_allclose(logits, want["gen_logits"], rtol=0, atol=LOGITS)
