"""Tiny random models and prompts for tests that prove equalities."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

IMAGE, VIDEO, PAD, VOCAB = 98, 99, 0, 100
PATCHES = 36  # visual tokens of one image of `llava()`
TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# eager attention softmaxes in float32, where a float64 mask value gives NaN: test it in float32
DTYPE = {"sdpa": torch.float64, "eager": torch.float32}
EARLY_DROP = [{"early_drop": True}, {"early_drop": False}]  # a pruning layer computes survivors only, or all rows
SUPPRESS = [IMAGE, VIDEO, PAD]  # a random model would otherwise "say" an image
GENERATE = dict(
    max_new_tokens=6, do_sample=False, suppress_tokens=SUPPRESS, return_dict_in_generate=True, output_logits=True
)


def text_config(family: str = "llama", layers: int = 8, **kwargs):
    extra = {"sliding_window": None} if family == "mistral" else {}
    base = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, head_dim=16,
    )  # fmt: skip
    return TEXT[family](**{**base, **extra, **kwargs})


def _finish(cls, config, impl, dtype, seed):
    torch.manual_seed(seed)
    model = cls(config).eval().to(dtype)
    model.set_attn_implementation(impl)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def llava(family="llama", impl="sdpa", dtype=None, seed=0, layers=8, image=42, **kwargs):
    """LLaVA of 8 layers, 36 visual tokens per image, grouped-query attention."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=image,
        patch_size=7, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(family, layers, **kwargs), image_token_index=IMAGE,
        image_seq_length=(image // 7) ** 2,
    )  # fmt: skip
    return _finish(LlavaForConditionalGeneration, config, impl, dtype or DTYPE[impl], seed)


def video_llava(impl="sdpa", dtype=None, seed=0, layers=8):
    """Video-LLaVA of 8 layers: 16 + 1 visual tokens per frame, 8 frames; 16 + 1 per image."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
        projection_dim=32,
    )  # fmt: skip
    config = VideoLlavaConfig(
        vision_config=vision, text_config=text_config(layers=layers), image_token_index=IMAGE,
        video_token_index=VIDEO, image_seq_length=16, video_seq_length=8 * 17,
    )  # fmt: skip
    return _finish(VideoLlavaForConditionalGeneration, config, impl, dtype or DTYPE[impl], seed)


def prompt(parts, n_image=PATCHES, n_video=136) -> list[int]:
    """Token ids: ints are that many random words, "I" an image, "V" a video."""
    out = []
    for p in parts:
        if p == "I":
            out += [IMAGE] * n_image
        elif p == "V":
            out += [VIDEO] * n_video
        else:
            out += torch.randint(3, 90, (p,)).tolist()
    return out


def pad(rows: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids [B, L] and attention mask."""
    n = max(map(len, rows))
    ids = [[PAD] * (n - len(r)) + r if side == "left" else r + [PAD] * (n - len(r)) for r in rows]
    mask = [[0] * (n - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (n - len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


LAYOUTS = {
    "one": [[5, "I", 9]],
    "batch": [[5, "I", 9], [3, "I", 14], [7, "I", 6]],  # other text lengths
    "multi": [[4, "I", 5, "I", 8]],  # two images, text between
    "ragged": [[5, "I", 9], [3, "I", 4, "I", 12], [11]],  # one, two and no image
}


def inputs(kind="one", model=None, seed=1, side="left"):
    """Model inputs for one of LAYOUTS, and the unpadded rows."""
    torch.manual_seed(seed)
    rows = [prompt(parts) for parts in LAYOUTS[kind]]
    ids, mask = pad(rows, side)
    count = sum(r.count(IMAGE) for r in rows) // PATCHES
    pixels = torch.randn(count, 3, 42, 42, dtype=model.dtype if model is not None else torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, rows


def single(batch: dict, rows: list[list[int]], b: int) -> dict:
    """Inputs of row `b` by itself."""
    counts = [r.count(IMAGE) // PATCHES for r in rows]
    pixels = batch["pixel_values"][sum(counts[:b]) : sum(counts[: b + 1])]
    out = {"input_ids": torch.tensor([rows[b]]), "attention_mask": torch.ones(1, len(rows[b]), dtype=torch.long)}
    return {**out, "pixel_values": pixels} if len(pixels) else out


def logits(out) -> torch.Tensor:
    """[B, steps, vocab] of a generate() output."""
    return torch.stack(out.logits, 1)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None) -> None:
    tolerance = tolerance or (1e-9 if a.dtype == torch.float64 else 3e-4)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
