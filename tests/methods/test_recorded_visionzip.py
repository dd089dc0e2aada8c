"""VisionZip against recorded runs of its authors' code on a 24-layer CLIP tower with 576 patches."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import sparsevlm
from tests.goldens import clip_recipe as recipe
from tests.goldens.load import files, recording, stem
from tests.tiny import IMAGE, PAD, text_config

pytestmark = pytest.mark.recordings


@cache
def model(seed: int) -> LlavaForConditionalGeneration:
    """LLaVA around the recorded tower; its own weights do not matter here."""
    vision = CLIPVisionConfig(**recipe.CLIP_CONFIG)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(layers=2), image_token_index=IMAGE, image_seq_length=576
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(config).eval()
    weights = {name: torch.from_numpy(value) for name, value in recipe.clip_state_dict(seed).items()}
    llava.model.vision_tower.load_state_dict(weights)
    llava.generation_config.pad_token_id = PAD
    return llava


@pytest.mark.parametrize("path", files("peers", "visionzip_*.npz"), ids=stem)
@pytest.mark.parametrize("by_budget", [False, True])
def test_same_scores_same_tokens(path, by_budget: bool):
    meta, golden = recording(path)
    dominant, contextual = meta["dominant"], meta["contextual"]
    llava = model(meta["seed"])
    ids = torch.tensor([[5, 6] + [IMAGE] * 576 + [7, 8, 9]])
    pixels = torch.from_numpy(recipe.clip_pixels(meta["seed"]))
    options = {"budget": dominant + contextual} if by_budget else {"dominant": dominant, "contextual": contextual}
    projected = []
    with sparsevlm.build("visionzip", **options)(llava) as trace, torch.no_grad():
        hook = llava.model.multi_modal_projector.linear_1.register_forward_pre_hook(lambda m, x: projected.append(x[0]))
        out = llava(input_ids=ids, pixel_values=pixels)
        hook.remove()
    stage = trace.prefills[0].stages[0]
    best = np.abs(golden["cls_scores"]).max()
    np.testing.assert_allclose(stage.scores[0], golden["cls_scores"], rtol=1e-5, atol=1e-5 * best)
    assert stage.kept[0].tolist() == sorted(i - 1 for i in golden["all_indices"].tolist() if i)
    assert stage.layer == -1 and stage.tokens_out == [dominant + contextual]
    assert stage.recycled == [contextual + 1]  # and CLS
    np.testing.assert_allclose(projected[0], golden["tokens"], atol=2e-5)
    held = {layer.keys.shape[2] for layer in out.past_key_values.layers}
    assert held == {5 + dominant + contextual}
