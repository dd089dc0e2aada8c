"""The models and prompts of the recordings in frontier/: a tiny CLIP tower, a linear projector, a tiny Llama."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsevlm.runtime.vision import Pictures, Tower
from tests.goldens import clip_recipe, frontier_recipe, recipe
from tests.goldens.frontier_recipe import IMAGE, LLAMAS, PATCHES

STEPS = 5


def tensor(x) -> Tensor:
    return torch.from_numpy(x).double()


@lru_cache(maxsize=2)
def llava(config: str, seed: int) -> LlavaForConditionalGeneration:
    """LLaVA of the recorded weights, float64; its projector is one linear layer."""
    arguments = dict(LLAMAS[config])
    rope = {"rope_type": "default", "rope_theta": arguments.pop("rope_theta")}
    text = LlamaConfig(**arguments, rope_parameters=rope, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)
    vision = CLIPVisionConfig(**clip_recipe.CLIP_CONFIG)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES)
    )
    recipe.CONFIGS.setdefault(config, LLAMAS[config])
    weights = {name: torch.from_numpy(value) for name, value in recipe.llama_state_dict(config, seed).items()}
    own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    model.model.language_model.load_state_dict(own)
    model.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    tower = {name: torch.from_numpy(value) for name, value in clip_recipe.clip_state_dict(seed).items()}
    model.model.vision_tower.load_state_dict(tower)
    projector = model.model.multi_modal_projector
    weight, bias = frontier_recipe.projector(seed, text.hidden_size)
    projector.linear_1.weight.data, projector.linear_1.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    projector.act = projector.linear_2 = nn.Identity()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval().requires_grad_(False).double()


@dataclass
class Run:
    """What `generate` makes of the recorded prompt under a method.

    Attributes:
        record: the trace's record of the prompt.
        projected: [T, D] rows that the language model gets for the picture.
        positions: [L] places of the rows in the unpruned prompt, as the first layer's rotation has them.
        logits: [steps, vocabulary].
        ids: generated.
        cached: per layer, the tokens in the cache after the prompt.
    """

    record: object
    projected: Tensor
    logits: Tensor
    ids: list[int]
    cached: list[int] = field(default_factory=list)


def prompt(seed: int) -> dict[str, Tensor]:
    before, after = frontier_recipe.prompt_ids(seed)
    pixels = tensor(clip_recipe.clip_pixels(seed))
    return {"input_ids": torch.tensor([[*before, *[IMAGE] * PATCHES, *after]]), "pixel_values": pixels}


@torch.no_grad()
def run(config: str, seed: int, method) -> Run:
    model, rows = llava(config, seed), []
    with method(model) as trace:
        layer = model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
        try:
            out = model.generate(
                **prompt(seed), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        finally:
            hook.remove()
    start = frontier_recipe.BEFORE
    projected = rows[0][0, start : rows[0].shape[1] - frontier_recipe.AFTER]
    cached = [layer.keys.shape[2] - STEPS + 1 for layer in out.past_key_values.layers]
    ids = out.sequences[0, -STEPS:].tolist()
    return Run(trace.prefills[0], projected, torch.cat(out.logits), ids, cached)


class Signals(Pictures):
    """Made-up outputs of a tower of 24 blocks, of which the last but one is read."""

    def __init__(self, seed: int, projected: bool = False, segments: int = 1):
        self.signals = {name: tensor(x) for name, x in frontier_recipe.signals(seed, segments).items()}
        states = self.signals["states"][None]
        features = self.signals["projected"][None] if projected else states
        super().__init__(
            Tower(None, "image", 22, frontier_recipe.SIDE, False), features, nn.functional.pad(states, (0, 0, 1, 0))
        )

    def cls_attention(self) -> Tensor:
        return self.signals["cls"][self.tower.layer][None]
