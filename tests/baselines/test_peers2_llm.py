"""Methods inside the language model against recordings of their authors' code (tests/goldens/peers2), in float64.

FiCoCo-L's code takes the first 576 tokens of any prompt for the picture; so does the mask given here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from tests.goldens import peers2, recipe
from tests.goldens.load import files, recording, stem

pytestmark = pytest.mark.recordings
LOGITS = 1e-5


@torch.no_grad()
def run(meta: dict, method, start: int):
    """The record, the cached tokens per layer and the last token's logits of a prompt with its picture at `start`."""
    model = peers2.llama(meta["config"], meta["seed"])
    shape = meta["pre"], meta["n_vis"], meta["n_text"]
    recipe.CONFIGS.setdefault("E", peers2.peers2_recipe.LLAMAS["E"])
    embeds = torch.from_numpy(recipe.inputs_embeds(meta["config"], meta["seed"], *shape)).double()
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + meta["n_vis"]] = True
    with method(model, visual_mask=visual) as trace:
        out = model(inputs_embeds=embeds, use_cache=True)
    return trace.prefills[0], [layer.keys.shape[2] for layer in out.past_key_values.layers], out.logits[0, -1]


@pytest.mark.parametrize("path", files("peers2", "ficoco_l_*.npz"), ids=stem)
def test_ficoco_l(path: Path):
    meta, want = recording(path)
    method = sparsevlm.build("ficoco_l", variant="code", r=meta["r"], start=meta["first_layer"])
    record, cached, logits = run(meta, method, 0)
    origin = np.arange(meta["n_vis"])
    for stage, gone in zip(record.stages, want["gone"], strict=False):
        assert sorted(set(origin) - set(stage.origin[0].tolist())) == sorted(gone.tolist())
        origin = stage.origin[0].numpy()
    last = want["gone"][len(record.stages) :]  # of the last layer, where ours discards nothing
    assert len(last) == (len(want["gone"]) == len(cached) - meta["first_layer"])
    assert sorted([*want["kept"].tolist(), *last.flatten().tolist()]) == origin.tolist()
    assert cached == want["kv_len"].tolist()
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=LOGITS)
