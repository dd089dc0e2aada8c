"""SGL against recorded runs of its authors' own code (tests/goldens/seeds, NUS-HPC-AI-Lab/SGL at 7e76fd2).

Guide and large model are tiny random Llamas with embeddings of their own; both generate greedily, the guide with eager
attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from sparsevlm.methods.sgl import surety
from sparsevlm.runtime.families import locate
from sparsevlm.runtime.guide import Answers, Guide, Prompts
from tests.goldens import load
from tests.goldens.load import files, recording, stem
from tests.tiny import EARLY_DROP

IMPORTANCE, LOGITS = 1e-5, 5e-5
FILES = files("seeds", "sgl_*.npz")
pytestmark = pytest.mark.recordings


def asked(meta: dict, answer_tokens: int) -> tuple[Guide, Prompts, Answers]:
    """The guide of a recording, its prompt and its answer."""
    model = load.llama(meta["guide"], meta["guide_seed"], sha256=meta["guide_weights_sha256"])
    shape = meta["pre"], meta["n_vis"], meta["n_text"]
    embeds, visual = load.prompt(meta["guide"], meta["guide_seed"], *shape, meta["guide_embeds_sha256"])
    guide = Guide(locate(model), answer_tokens)
    prompts = Prompts.aligned(embeds, np.ones(visual.shape, bool), visual.numpy())
    return guide, prompts, guide.ask(prompts)


def close(got, want, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_guide(path: Path):
    meta, want = recording(path)
    visual = slice(meta["pre"], meta["pre"] + meta["n_vis"])
    _, _, found = asked(meta, meta["new_tokens"])
    close(found.importance[0, visual], want["importance"], IMPORTANCE)
    close(found.prefill[0, visual], want["importance_prefill"], IMPORTANCE)
    assert not found.importance[0, : visual.start].any() and not found.importance[0, visual.stop :].any()
    assert found.ids[0].tolist() == want["guide_ids"].tolist() and found.lengths == [meta["new_tokens"]]
    np.testing.assert_allclose(found.logits[0].numpy(), want["guide_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_confidence_and_consistency(path: Path):
    meta, want = recording(path)
    guide, prompts, found = asked(meta, meta["new_tokens"])
    sure = surety(guide, prompts, found, meta["consistency_ratio"])
    close(sure.confidence, want["confidence"], 1e-5)
    close(sure.consistency, want["consistency"], 1e-4)  # a product of several probabilities
    np.testing.assert_allclose(sure.logits[0].numpy(), want["consistency_logits"], rtol=0, atol=LOGITS)
    close(sure.score, (want["confidence"] + want["consistency"]) / 2, 1e-5)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("path", FILES, ids=stem)
def test_large_model(path: Path, options: dict):
    meta, want = recording(path)
    model = load.llama(meta["large"], meta["large_seed"], sha256=meta["weights_sha256"])
    shape = meta["pre"], meta["n_vis"], meta["n_text"]
    embeds, visual = load.prompt(meta["large"], meta["large_seed"], *shape, meta["embeds_sha256"])
    importance = torch.from_numpy(want["importance"])[None]
    method = sparsevlm.build("sgl", importance=importance, k=meta["K"], keep=meta["keep"], **options)
    arguments = {"attention_mask": torch.ones(visual.shape, dtype=torch.long), "max_new_tokens": meta["new_tokens"]}
    with method(model, visual_mask=visual) as trace:
        out = model.generate(
            inputs_embeds=embeds, **arguments, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    (stage,) = trace.prefills[0].stages
    assert stage.layer == meta["K"] - 1
    assert stage.kept[0].tolist() == stage.origin[0].tolist() == want["keep_visual"].tolist()
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == want["kv_len"].tolist()
    assert out.sequences[0].tolist() == want["gen_ids"].tolist()
    np.testing.assert_allclose(torch.cat(out.logits).numpy(), want["gen_logits"], rtol=0, atol=LOGITS)
