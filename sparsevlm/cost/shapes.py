"""Shapes of the known models, and a prompt that fits each: `flops.py` counts it, `latency.py` times it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sparsevlm.mini import weights_dir
from sparsevlm.runtime.families import RECORDS

VIDEO_FRAMES = 8  # Video-LLaVA's training and evaluation setting
SYSTEM_TOKENS = 35  # tokens before the image in LLaVA-1.5's template with its system sentence
IMAGE_TOKENS = 576  # visual tokens of a prompt to a text model, unless others are asked for
_MLP_RATIO = 11008 / 4096  # of LLaMA-7B: the width of a text model's MLP follows its hidden size
_HEAD_WIDTH = 64


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


def _qwen2(vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768,
    )  # fmt: skip


def _qwen3(vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
    )  # fmt: skip


# The published config.json files, restated so that counting needs neither a download nor weights.
PUBLISHED = {
    "llava-1.5-7b": lambda: _llava(4096, 11008, 32, 32),
    "llava-1.5-13b": lambda: _llava(5120, 13824, 40, 40),
    "video-llava-7b": lambda: VideoLlavaConfig(text_config=_vicuna(4096, 11008, 32, 32)),
    # the language models alone: what the tower computes depends on the picture
    "llava-next-7b": lambda: _vicuna(4096, 11008, 32, 32),
    "llava-onevision-7b": lambda: _qwen2(152000),
    "internvl3-8b": lambda: _qwen2(151674),
    "qwen2-vl-7b": lambda: _qwen2(152064),
    "qwen2.5-vl-7b": lambda: _qwen2(152064),
    "qwen3-vl-8b": lambda: _qwen3(151936),
}


def load_config(model: str) -> PretrainedConfig:
    """Configuration of a model, without its weights and without a network.

    Args:
        model: a name of PUBLISHED, "mini", a folder that holds a config.json, or a text model "llama-<hidden>x<layers>"
            or "llama-<hidden>x<layers>x<heads>" (LLaMA's proportions; heads of 64).

    Returns:
        Where visual tokens depend on the picture, the language model alone, as a text model of its shape.

    Raises:
        ValueError: none of these; the message lists the names.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]()
    if model.startswith("llama-"):
        return _llama(model)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        try:
            folder = weights_dir(model)
        except ValueError as error:
            known = ", ".join(PUBLISHED)
            raise ValueError(f"no shapes for model {model!r}: it is none of {known}, no folder with a config.json, "
                             f"and {error}") from None  # fmt: skip
    config = AutoConfig.from_pretrained(folder)
    record = RECORDS.get(config.model_type)
    if record is None:
        raise ValueError(f"{folder}/config.json is a {config.model_type!r} model; known: {', '.join(RECORDS)}")
    return config if record.grid else _text_model(config.get_text_config())


def _text_model(text: PretrainedConfig) -> PretrainedConfig:
    """A text model by itself with the layers of a Qwen one, whose positions of several axes cost as much as one."""
    made = {"qwen2_vl_text": Qwen2Config, "qwen2_5_vl_text": Qwen2Config, "qwen3_vl_text": Qwen3Config}
    if text.model_type not in made:
        return text
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    head = {"head_dim": text.head_dim} if text.model_type == "qwen3_vl_text" else {}
    return made[text.model_type](**{key: getattr(text, key) for key in keys}, **head)


def _llama(name: str) -> LlamaConfig:
    match = re.fullmatch(r"llama-(\d+)x(\d+)(?:x(\d+))?", name)
    if match is None:
        raise ValueError(f"shape {name!r}: write llama-<hidden>x<layers> or llama-<hidden>x<layers>x<heads>")
    hidden, layers, heads = (int(x) if x else None for x in match.groups())
    heads = heads or max(1, hidden // _HEAD_WIDTH)
    if not hidden or not layers or hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"shape {name!r}: layers must be above 0, and hidden / heads an even number")
    return LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=int(_MLP_RATIO * hidden), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1 << 16,
    )  # fmt: skip


def model_class(config: PretrainedConfig) -> type:
    """The class of transformers for a configuration of `load_config`."""
    classes = {"llava": LlavaForConditionalGeneration, "video_llava": VideoLlavaForConditionalGeneration}
    return classes.get(config.model_type) or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@dataclass
class Prompt:
    """One prompt with one image (LLaVA) or one video (Video-LLaVA), repeated `batch_size` times, without padding.

    Attributes:
        inputs: `input_ids` [B, L] int64 and `pixel_values` [B, 3, S, S] or `pixel_values_videos` [B, 8, 3, S, S]; of a
            text model `inputs_embeds` [B, L, D], of which the visual ones are a span.
        visual_mask: [B, L] bool, always on the CPU: a method that is given it need not read a device tensor.
        visual_tokens: visual tokens per sample.
        before: text tokens before them.
    """

    inputs: dict[str, torch.Tensor]
    visual_mask: torch.Tensor
    visual_tokens: int
    before: int

    @property
    def layout(self) -> str:
        """As "35+576+25": text, visual tokens, text."""
        after = self.visual_mask.shape[1] - self.visual_tokens - self.before
        return f"{self.before}+{self.visual_tokens}+{after}"


def make_prompt(
    config: PretrainedConfig,
    text_tokens: int,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    before: int | None = None,
    visual_tokens: int | None = None,
) -> Prompt:
    """Random pixels and random words in the model's prompt layout: text, visual tokens, text.

    Args:
        config: a configuration of `load_config`.
        text_tokens: all tokens that are not visual, >= 3 (at least one before and two after the visual tokens).
        before: how many of them stand before the visual tokens; default: a third, at most 35 (LLaVA-1.5's system
            sentence).
        visual_tokens: of a text model (default 576); those of other models follow from their pictures.

    Raises:
        ValueError: `text_tokens` or `batch_size` too small, or `before` or `visual_tokens` that do not fit.
    """
    if text_tokens < 3:
        raise ValueError(f"text_tokens={text_tokens}: give 3 or more (all tokens that are not visual)")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    before = min(SYSTEM_TOKENS, text_tokens // 3) if before is None else before
    if not 0 <= before <= text_tokens - 2:
        raise ValueError(f"before={before} of text_tokens={text_tokens}: two or more must follow the visual tokens")
    pictures = getattr(config, "vision_config", None) is not None
    found, shape, name = _pictures(config, batch_size) if pictures else (visual_tokens or IMAGE_TOKENS, None, None)
    if visual_tokens not in (None, found):
        raise ValueError(f"{visual_tokens} visual tokens asked for, but a picture of this model has {found}")
    visual_mask = torch.zeros(batch_size, found + text_tokens, dtype=torch.bool)
    visual_mask[:, before : before + found] = True
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=dtype, device=device)  # a meta tensor has a shape and no values
        return made if made.is_meta else made.copy_(torch.randn(size, generator=generator))

    if not pictures:
        inputs = {"inputs_embeds": random(*visual_mask.shape, config.hidden_size)}
        return Prompt(inputs, visual_mask, found, before)
    ids = torch.empty(visual_mask.shape, dtype=torch.long, device=device)
    if not ids.is_meta:
        words = _plain_words(config)
        token = config.image_token_index if name == "pixel_values" else config.video_token_index
        words = words[torch.randint(len(words), visual_mask.shape, generator=generator)]
        ids.copy_(words.masked_fill(visual_mask, token))
    return Prompt({"input_ids": ids, name: random(*shape)}, visual_mask, found, before)


def _pictures(config: PretrainedConfig, batch_size: int) -> tuple[int, tuple[int, ...], str]:
    """Visual tokens of one sample, shape of the pixels, and what the model calls them."""
    vision = config.vision_config
    size, patches = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    if config.model_type == "video_llava":  # every frame keeps its class token
        return VIDEO_FRAMES * (patches + 1), (batch_size, VIDEO_FRAMES, 3, size, size), "pixel_values_videos"
    tokens = patches + (config.vision_feature_select_strategy == "full")
    return tokens, (batch_size, 3, size, size), "pixel_values"


def _plain_words(config: PretrainedConfig) -> torch.Tensor:
    """Ids of the words that are no placeholder and no special token."""
    text = config.text_config
    special = {config.image_token_index, getattr(config, "video_token_index", None)}
    special |= {text.pad_token_id, text.bos_token_id, text.eos_token_id}
    return torch.tensor([i for i in range(text.vocab_size) if i not in special])
