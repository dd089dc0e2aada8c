"""The models and prompts of the recordings in peers2/, in float64, as these were made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.goldens import clip_recipe, peers2_recipe, recipe
from tests.goldens.peers2_recipe import AFTER, BEFORE, IMAGE

PATCHES = 576


def tensors(arrays: dict, prefix: str = "") -> dict[str, Tensor]:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): torch.from_numpy(a) for name, a in arrays.items() if name.startswith(prefix)}


def llama_config(config: str) -> LlamaConfig:
    arguments = dict(peers2_recipe.LLAMAS[config])
    rope = {"rope_type": "default", "rope_theta": arguments.pop("rope_theta")}
    return LlamaConfig(**arguments, rope_parameters=rope, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)


@cache
def llama_weights(config: str, seed: int) -> dict:
    recipe.CONFIGS.setdefault(config, peers2_recipe.LLAMAS[config])
    return recipe.llama_state_dict(config, seed)


@lru_cache(maxsize=2)
def llama(config: str, seed: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(config)).eval().requires_grad_(False)
    model.load_state_dict(tensors(llama_weights(config, seed)))
    return model.double()


@lru_cache(maxsize=3)
def llava(config: str, seed: int) -> LlavaForConditionalGeneration:
    """LLaVA of the recorded tower, projector and Llama."""
    text = llama_config(config)
    vision = CLIPVisionConfig(**clip_recipe.CLIP_CONFIG)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES)
    )
    weights = llama_weights(config, seed)
    model.model.language_model.load_state_dict(tensors(weights, "model."))
    model.lm_head.load_state_dict(tensors(weights, "lm_head."))
    model.model.vision_tower.load_state_dict(tensors(clip_recipe.clip_state_dict(seed)))
    model.model.multi_modal_projector.load_state_dict(tensors(peers2_recipe.projector(seed, text.hidden_size)))
    return model.eval().requires_grad_(False).double()


def pixels(seed: int) -> Tensor:
    """[1, 3, 336, 336] float64."""
    return torch.from_numpy(clip_recipe.clip_pixels(seed)).double()


@cache
def clip(seed: int) -> CLIPModel:
    """CLIP around the vision tower, with the text tower of the recordings."""
    config = CLIPConfig(
        text_config=CLIPTextConfig(**peers2_recipe.CLIP_TEXT).to_dict(),
        vision_config=CLIPVisionConfig(**clip_recipe.CLIP_CONFIG).to_dict(),
        projection_dim=peers2_recipe.WIDTH,
    )
    model = CLIPModel(config)
    vision = {f"vision_model.{name}": value for name, value in clip_recipe.clip_state_dict(seed).items()}
    missing, unexpected = model.load_state_dict(
        tensors(vision | peers2_recipe.clip_text_state_dict(seed)), strict=False
    )
    assert not unexpected and all("position_ids" in name or name == "logit_scale" for name in missing)
    return model.eval().requires_grad_(False).double()


@dataclass
class Run:
    """What one forward of a method makes.

    Attributes:
        record: the trace's record of the prompt.
        projector_in, projector_out: [T, d] the picture's tokens.
        logits: [vocabulary] of the last token of the prompt.
        cached: per layer, the tokens in the cache.
    """

    record: object
    projector_in: Tensor
    projector_out: Tensor
    logits: Tensor
    cached: list[int]


def inputs_of(seed: int) -> dict[str, Tensor]:
    before, after = peers2_recipe.prompt_ids(seed)
    assert len(before) == BEFORE and len(after) == AFTER
    return {"input_ids": torch.tensor([[*before, *[IMAGE] * PATCHES, *after]]), "pixel_values": pixels(seed)}


@torch.no_grad()
def run_llava(config: str, seed: int, method) -> Run:
    """One forward of the recorded prompt with its picture."""
    model, seen = llava(config, seed), []
    projector = model.model.multi_modal_projector
    with method(model) as trace:
        hook = projector.linear_1.register_forward_hook(lambda m, args, out: seen.append(args[0].reshape(-1, 64)))
        second = projector.linear_2.register_forward_hook(lambda m, args, out: seen.append(out.flatten(0, -2)))
        try:
            out = model(**inputs_of(seed), use_cache=True)
        finally:
            hook.remove(), second.remove()
    cached = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    return Run(trace.prefills[0], seen[0], seen[1], out.logits[0, -1], cached)
