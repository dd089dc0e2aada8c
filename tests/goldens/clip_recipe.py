"""Weights and pixels of the CLIP tower of the VisionZip recordings, bit for bit reproducible (see recipe.py)."""

from __future__ import annotations

import numpy as np

from tests.goldens.recipe import _draw

CLIP_CONFIG = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=24, num_attention_heads=4, image_size=336, patch_size=14,
    projection_dim=64,
)  # fmt: skip


def clip_state_dict(seed: int) -> dict[str, np.ndarray]:
    """Float32 weights by the names of transformers' CLIPVisionModel."""
    config, random = CLIP_CONFIG, np.random.RandomState(9000 + seed)
    d, m, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    places = (config["image_size"] // patch) ** 2 + 1
    out = {
        "embeddings.class_embedding": _draw(random, (d,), 1.0),
        "embeddings.patch_embedding.weight": _draw(random, (d, 3, patch, patch), 0.06),
        "embeddings.position_embedding.weight": _draw(random, (places, d), 0.5),
    }

    def norm(name: str) -> None:
        out[f"{name}.weight"] = np.float32(1) + _draw(random, (d,), 0.1)
        out[f"{name}.bias"] = _draw(random, (d,), 0.05)

    norm("pre_layrnorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for name, scale in (("k_proj", 1.35), ("v_proj", 1.0), ("q_proj", 1.35), ("out_proj", 0.3)):
            out[f"{layer}.self_attn.{name}.weight"] = _draw(random, (d, d), scale * d**-0.5)
            out[f"{layer}.self_attn.{name}.bias"] = _draw(random, (d,), 0.05)
        norm(f"{layer}.layer_norm1")
        out[f"{layer}.mlp.fc1.weight"] = _draw(random, (m, d), d**-0.5)
        out[f"{layer}.mlp.fc1.bias"] = _draw(random, (m,), 0.05)
        out[f"{layer}.mlp.fc2.weight"] = _draw(random, (d, m), 0.25 * m**-0.5)
        out[f"{layer}.mlp.fc2.bias"] = _draw(random, (d,), 0.05)
        norm(f"{layer}.layer_norm2")
    norm("post_layernorm")
    return out


def clip_pixels(seed: int) -> np.ndarray:
    """[1, 3, 336, 336] float32."""
    size = CLIP_CONFIG["image_size"]
    return _draw(np.random.RandomState(9500 + seed), (1, 3, size, size), 1.0)
