"""Shapes of the known models, and a prompt that fits each: `flops.py` counts it, `latency.py` times it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, PretrainedConfig, VideoLlavaConfig

from sparsevlm.mini import weights_dir

VIDEO_FRAMES = 8  # Video-LLaVA's training and evaluation setting
SYSTEM_TOKENS = 35  # tokens before the image in LLaVA-1.5's template with its system sentence


def _llava(hidden: int, intermediate: int, layers: int, heads: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=_vicuna(hidden, intermediate, layers, heads))


def _vicuna(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32064, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
    )  # fmt: skip


# The published config.json files, restated so that counting needs neither a download nor weights.
PUBLISHED = {
    "llava-1.5-7b": lambda: _llava(4096, 11008, 32, 32),
    "llava-1.5-13b": lambda: _llava(5120, 13824, 40, 40),
    "video-llava-7b": lambda: VideoLlavaConfig(text_config=_vicuna(4096, 11008, 32, 32)),
}


def load_config(model: str) -> PretrainedConfig:
    """Configuration of a model, without its weights and without a network.

    Args:
        model: "llava-1.5-7b", "llava-1.5-13b", "video-llava-7b", "mini", or a folder that holds a config.json.

    Raises:
        ValueError: neither a known name nor such a folder; the message lists the names.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]()
    folder = Path(model)
    if not (folder / "config.json").is_file():
        try:
            folder = weights_dir(model)
        except ValueError as error:
            known = ", ".join(PUBLISHED)
            raise ValueError(f"no shapes for model {model!r}: it is none of {known}, no folder with a config.json, "
                             f"and {error}") from None  # fmt: skip
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("llava", "video_llava"):
        raise ValueError(f"{folder}/config.json is a {config.model_type!r} model; known: llava, video_llava")
    return config


@dataclass
class Prompt:
    """One prompt with one image (LLaVA) or one video (Video-LLaVA), repeated `batch_size` times, without padding.

    Attributes:
        inputs: `input_ids` [B, L] int64 and `pixel_values` [B, 3, S, S] or `pixel_values_videos` [B, 8, 3, S, S].
        visual_mask: [B, L] bool, always on the CPU: a method that is given it need not read a device tensor.
        visual_tokens: visual tokens per sample.
    """

    inputs: dict[str, torch.Tensor]
    visual_mask: torch.Tensor
    visual_tokens: int


def make_prompt(
    config: PretrainedConfig,
    text_tokens: int,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Prompt:
    """Random pixels and random words in the model's prompt layout: text, visual tokens, text.

    Of the text, a third but at most 35 tokens (LLaVA-1.5's system sentence) stands before the visual tokens.

    Args:
        config: a LLaVA or Video-LLaVA configuration.
        text_tokens: all tokens that are not visual, >= 3 (at least one before and two after the visual tokens).

    Raises:
        ValueError: `text_tokens` or `batch_size` too small.
    """
    if text_tokens < 3:
        raise ValueError(f"text_tokens={text_tokens}: give 3 or more (all tokens that are not visual)")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    vision = config.vision_config
    size, patches = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    if config.model_type == "video_llava":  # every frame keeps its class token
        name, token = "pixel_values_videos", config.video_token_index
        shape, visual_tokens = (batch_size, VIDEO_FRAMES, 3, size, size), VIDEO_FRAMES * (patches + 1)
    else:
        name, token = "pixel_values", config.image_token_index
        shape, visual_tokens = (batch_size, 3, size, size), patches
        visual_tokens += config.vision_feature_select_strategy == "full"
    before = min(SYSTEM_TOKENS, text_tokens // 3)
    visual_mask = torch.zeros(batch_size, visual_tokens + text_tokens, dtype=torch.bool)
    visual_mask[:, before : before + visual_tokens] = True
    inputs = {
        "input_ids": torch.empty(visual_mask.shape, dtype=torch.long, device=device),
        name: torch.empty(shape, dtype=dtype, device=device),
    }
    if torch.device(device).type != "meta":  # a meta tensor has a shape and no values
        generator = torch.Generator().manual_seed(seed)
        words = _plain_words(config)
        ids = words[torch.randint(len(words), visual_mask.shape, generator=generator)].masked_fill(visual_mask, token)
        inputs["input_ids"].copy_(ids)
        inputs[name].copy_(torch.randn(shape, generator=generator))
    return Prompt(inputs, visual_mask, visual_tokens)


def _plain_words(config: PretrainedConfig) -> torch.Tensor:
    """Ids of the words that are no placeholder and no special token."""
    text = config.text_config
    special = {config.image_token_index, getattr(config, "video_token_index", None)}
    special |= {text.pad_token_id, text.bos_token_id, text.eos_token_id}
    return torch.tensor([i for i in range(text.vocab_size) if i not in special])
