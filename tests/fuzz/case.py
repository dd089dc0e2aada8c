"""What one case of the fuzzer is: a model, a method, prompts, and how they are run. Plain data, so that it prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from tests.tiny import IMAGE, PAD, VIDEO, text_config

FRAMES = 8
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A random model.

    Attributes:
        kind: "llava", "video_llava" or "text" (a text model by itself, visual tokens given by `visual_mask`).
        family: of the text model.
        layers, heads, kv_heads, head_dim, theta, tied: of the text model.
        grid: patches per side of a picture.
        tower, feature_layer, select: blocks of the vision tower, and which of its features are read.
        window: sliding window in tokens, None = full attention.
    """

    kind: str = "llava"
    family: str = "llama"
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    theta: float = 1e4
    tied: bool = False
    grid: int = 3
    tower: int = 2
    feature_layer: int = -2
    select: str = "default"
    window: int | None = None
    seed: int = 0

    @property
    def image_tokens(self) -> int:
        return self.grid**2 + (self.kind == "llava" and self.select == "full")

    @property
    def video_tokens(self) -> int:
        return FRAMES * (self.grid**2 + 1)

    def tokens(self, part: int | str) -> int:
        """Tokens of a part of a prompt: a number of words, "I" an image, "V" a video."""
        return part if isinstance(part, int) else {"I": self.image_tokens, "V": self.video_tokens}[part]


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        shape, attention, dtype: the model.
        method, options: what prunes it.
        rows: per prompt its parts: numbers of words, "I" for an image, "V" for a video.
        side: of the padding; right only in plain forwards.
        entry: "ids" (with pixels), "both" (the same and visual_mask) or "embeds" (inputs_embeds and visual_mask).
        mode: "forward", "greedy", "sample", "beams", "lookup", "assisted" or "manual" (a decode loop by hand).
        cache: "dynamic", "static" or "none".
        turn: parts of a second turn on the pruned cache, the same for all prompts; None = no second turn.
        steps: generated tokens per turn.
        position_ids, attention_mask: whether the caller passes them where he may leave them out.
        square: whether a plain forward is given its mask in four dimensions.
        chunk: generate()'s prefill_chunk_size; None = the prompt in one piece.
        alone: compare each prompt of a batch with itself alone, too.
        seed: of words, pictures and sampling.
    """

    shape: Shape = field(default_factory=Shape)
    attention: str = "sdpa"
    dtype: str = "float64"
    method: str = "sparsevlm"
    options: dict = field(default_factory=dict)
    rows: tuple = ((2, "I", 3),)
    side: str = "left"
    entry: str = "ids"
    mode: str = "greedy"
    cache: str = "dynamic"
    turn: tuple | None = None
    steps: int = 3
    position_ids: bool = True
    attention_mask: bool = True
    square: bool = False
    chunk: int | None = None
    alone: bool = False
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def visual(self, parts: tuple) -> int:
        """Visual tokens of a prompt."""
        return sum(self.shape.tokens(p) for p in parts if isinstance(p, str))

    def length(self, parts: tuple) -> int:
        return sum(self.shape.tokens(p) for p in parts)


@lru_cache(maxsize=64)
def build_model(shape: Shape, attention: str, dtype: str) -> nn.Module:
    torch.manual_seed(shape.seed)
    extra = {"tie_word_embeddings": shape.tied, "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta}}
    if shape.window is not None:
        extra |= {"sliding_window": shape.window}
        if shape.family.startswith("qwen"):
            extra |= {"use_sliding_window": True, "max_window_layers": shape.layers // 2}
    text = text_config(
        shape.family, shape.layers, hidden_size=32, intermediate_size=48, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, **extra,
    )  # fmt: skip
    if shape.kind == "text":
        model = AutoModelForCausalLM.from_config(text)
    else:
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=shape.tower, num_attention_heads=2,
            image_size=shape.grid * 4, patch_size=4, projection_dim=16,
        )  # fmt: skip
        common = dict(
            vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=shape.image_tokens,
            vision_feature_layer=shape.feature_layer, tie_word_embeddings=shape.tied,
        )  # fmt: skip
        if shape.kind == "llava":
            config = LlavaConfig(vision_feature_select_strategy=shape.select, **common)
            model = LlavaForConditionalGeneration(config)
        else:
            config = VideoLlavaConfig(video_token_index=VIDEO, video_seq_length=shape.video_tokens, **common)
            model = VideoLlavaForConditionalGeneration(config)
        for name, p in model.named_parameters():  # attention of the tower far from uniform
            if "tower" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
                p.data = torch.randn_like(p) * 0.35
    model = model.eval().to(DTYPES[dtype]).requires_grad_(False)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def decoder_of(model: nn.Module) -> nn.Module:
    """The text model without its head."""
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


@dataclass
class Turn:
    """What a caller has in his hands for one turn of all prompts.

    Attributes:
        ids: per prompt its token ids.
        pixels: arguments of the forward, for all prompts.
        embeds: per prompt [L, D], what the unpruned model feeds to its layers.
    """

    ids: list[list[int]]
    pixels: dict
    embeds: list[Tensor]

    def only(self, b: int, case: Case) -> Turn:
        """The same of prompt `b` by itself."""
        pixels = {}
        for name, token, size in (
            ("pixel_values", IMAGE, case.shape.image_tokens),
            ("pixel_values_images", IMAGE, case.shape.image_tokens),
            ("pixel_values_videos", VIDEO, case.shape.video_tokens),
        ):
            if name in self.pixels:
                counts = [row.count(token) // size for row in self.ids]
                own = self.pixels[name][sum(counts[:b]) : sum(counts[: b + 1])]
                pixels |= {name: own} if len(own) else {}
        return Turn([self.ids[b]], pixels, [self.embeds[b]])


def make_turn(case: Case, model: nn.Module, rows: tuple, seed: int) -> Turn:
    """Words, pictures and embeddings for prompts of the given parts."""
    shape, generator = case.shape, torch.Generator().manual_seed(seed)
    ids = []
    for parts in rows:
        row: list[int] = []
        for part in parts:
            words = isinstance(part, int)
            row += torch.randint(3, 90, (part,), generator=generator).tolist() if words else (
                [{"I": IMAGE, "V": VIDEO}[part]] * shape.tokens(part)
            )  # fmt: skip
        ids.append(row)
    flat = torch.tensor([t for row in ids for t in row])
    embeds = model.get_input_embeddings()(flat).detach().clone()
    pixels, size = {}, shape.grid * 4
    if shape.kind == "text":
        visual = flat == IMAGE
        embeds[visual] = torch.randn(int(visual.sum()), embeds.shape[1], generator=generator).to(embeds.dtype)
    for kind, token in (("I", IMAGE), ("V", VIDEO)):
        count = sum(parts.count(kind) for parts in rows)
        if not count or shape.kind == "text":
            continue
        frames = (FRAMES,) if kind == "V" else ()
        x = torch.randn(count, *frames, 3, size, size, generator=generator).to(case.torch_dtype)
        image = "pixel_values" if shape.kind == "llava" else "pixel_values_images"
        pixels[image if kind == "I" else "pixel_values_videos"] = x
        read = model.model.get_image_features if kind == "I" else model.model.get_video_features
        features = torch.cat(list(read(x, return_dict=True).pooler_output)).reshape(-1, embeds.shape[1])
        embeds[flat == token] = features.to(embeds.dtype)
    return Turn(ids, pixels, list(embeds.split([len(row) for row in ids])))
