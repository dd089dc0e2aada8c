"""YOPO against recordings of its authors' code (tests/goldens/seeds), which masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from tests.goldens.load import files, recorded_model_and_prompt, recording, stem

pytestmark = pytest.mark.recordings
STATES, LOGITS = 1e-5, 5e-5
RECORDINGS = files("seeds", "yopo_*.npz")


def method_of(meta: dict, want: dict, folder: Path, removal: str):
    np.save(path := folder / "heads.npy", want["headmask"])
    cut = meta["layercut_num"]
    width = meta["attncut_w"]  # an even one acts as the next smaller one
    options = {"window": width - (width % 2 == 0), "heads": str(path), "ffn": 1 / meta["mlpcut_ratio"]}
    return sparsevlm.build("yopo", **options, cut=cut if cut < len(want["headmask"]) else None, removal=removal)


@torch.no_grad()
def run(model, embeds, visual, method, length: int):
    """[layers, L, D] output of each layer of the prompt, the last token's logits; greedy ids and their logits."""
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, args, out: states.append(out[0])) for layer in model.model.layers]
    with method(model, visual_mask=visual):
        logits = model(inputs_embeds=embeds).logits[0, -1]
        for hook in hooks:
            hook.remove()
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        options = {"max_new_tokens": length, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **options)
    return states, logits, out.sequences[0].tolist(), torch.cat(out.logits)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("path", RECORDINGS, ids=stem)
def test_masked_is_what_the_authors_code_computes(path: Path, backend: str, tmp_path):
    meta, want = recording(path)
    model, embeds, visual = recorded_model_and_prompt(meta)
    model.set_attn_implementation(backend)
    method = method_of(meta, want, tmp_path, "masked")
    states, logits, ids, generated = run(model, embeds, visual, method, len(want["gen_ids"]))
    states, first = torch.stack(states), int(visual[0].nonzero()[-1]) + 1
    np.testing.assert_allclose(states[:, -1], want["last_hidden"], rtol=0, atol=STATES)
    np.testing.assert_allclose(states[:, first], want["first_text_hidden"], rtol=0, atol=STATES)
    rows = torch.from_numpy(want["visual_rows"]) + meta["pre"]
    depth = len(want["visual_hidden"])
    assert depth == min(meta["layercut_num"], len(states))
    np.testing.assert_allclose(states[:depth, rows], want["visual_hidden"], rtol=0, atol=STATES)
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(generated, want["gen_logits"], rtol=0, atol=LOGITS)
    assert ids == want["gen_ids"].tolist()


@pytest.mark.parametrize("path", RECORDINGS, ids=stem)
def test_removing_for_real_is_another_function_where_heads_or_layers_are_cut(path: Path, tmp_path):
    """The keys that the authors zero after the softmax are in its denominator."""
    meta, want = recording(path)
    model, embeds, visual = recorded_model_and_prompt(meta)
    model.set_attn_implementation("sdpa")
    method = method_of(meta, want, tmp_path, "real")
    _, logits, ids, _ = run(model, embeds, visual, method, len(want["gen_ids"]))
    if method.cut is None and want["headmask"].all():
        np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=LOGITS)
        assert ids == want["gen_ids"].tolist()
    else:
        assert ids != want["gen_ids"].tolist() and np.abs(logits - want["logits"]).max() > 100 * LOGITS
