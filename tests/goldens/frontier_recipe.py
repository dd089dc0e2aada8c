"""Inputs of the recordings in frontier/, bit for bit reproducible (see recipe.py)."""

from __future__ import annotations

import numpy as np

from tests.goldens.clip_recipe import CLIP_CONFIG
from tests.goldens.recipe import CONFIGS, _draw

BEFORE, AFTER = 35, 24  # tokens of the prompt before the picture and after it
IMAGE = 100  # id of a picture's tokens, drawn nowhere
PATCHES, SIDE = 576, 24
# RESTORE's table of distances is written for heads of 128
LLAMAS = CONFIGS | {
    "R": dict(
        num_hidden_layers=5, hidden_size=256, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128,
        vocab_size=101, rope_theta=10000.0, rms_norm_eps=1e-6, max_position_embeddings=4096,
    )
}  # fmt: skip


def prompt_ids(seed: int) -> tuple[list[int], list[int]]:
    """Ids before and after the picture."""
    ids = np.random.RandomState(23000 + seed).randint(3, 100, size=BEFORE + AFTER).tolist()
    return [1, *ids[1:BEFORE]], ids[BEFORE:]


def projector(seed: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [hidden, 64] and bias of a linear projector."""
    random = np.random.RandomState(21000 + seed)
    return _draw(random, (hidden, CLIP_CONFIG["hidden_size"]), 0.075), _draw(random, (hidden,), 0.02)


def clip_head(seed: int, width: int = 32, segments: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """CLIP's visual projection [width, 64], and the unit embeddings [segments, width] of a text."""
    random = np.random.RandomState(22000 + seed)
    weight = _draw(random, (width, CLIP_CONFIG["hidden_size"]), 0.125)
    return weight, _unit(_draw(random, (segments, width), 1.0))


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True))).astype(np.float32)


def _scene(random, width: int, prototypes: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Patches [576, width]: rectangles of prototypes on a background, plus noise; and their prototypes."""
    means, label = _draw(random, (prototypes, width), 0.6), np.zeros((SIDE, SIDE), dtype=np.int64)
    for k in range(1, prototypes):
        y, x = random.randint(0, SIDE - 2, size=2)
        height, wide = random.randint(2, 9, size=2)
        label[y : y + height, x : x + wide] = k
    return means[label.reshape(-1)] + _draw(random, (PATCHES, width), 0.6 * noise), label.reshape(-1)


def signals(seed: int, segments: int = 1) -> dict[str, np.ndarray]:
    """Made-up signals of a picture and its question, float32.

    `states` [576, 32] of CLIP's layer -2; `cls` [24, 4, 576], attention of every block, not normalised; `projected`
    [576, 48]; `words` [7, 48]; in CLIP's joint space, unit: `clip_patch` [576, 24], `clip_text` [segments, 24].
    """
    random = np.random.RandomState(20000 + seed)
    states, label = _scene(random, 32, 18)
    mix, projected = _draw(random, (32, 48), 32**-0.5), np.zeros((PATCHES, 48), np.float32)
    for k in range(32):  # a matrix product in a fixed order
        projected = projected + states[:, k : k + 1] * mix[k][None]
    projected = projected + _draw(random, (PATCHES, 48), 0.25)
    u = random.randint(1, 65536, size=(24, 4, PATCHES)).astype(np.float32) * np.float32(2.0**-16)
    gain = (random.randint(1, 9, size=(18,)).astype(np.float32) * np.float32(0.25))[label][None, None]
    cls = u * u * u * u * gain * np.float32(2.0**-7)
    words = projected[random.randint(0, PATCHES, size=7)] * np.float32(0.25) + _draw(random, (7, 48), 0.35)
    patch, _ = _scene(random, 24, 14, noise=0.7)
    text = -patch[random.randint(0, PATCHES, size=segments)] + _draw(random, (segments, 24), 0.4)
    return {
        "states": states, "cls": cls.astype(np.float32), "projected": projected, "words": words.astype(np.float32),
        "clip_patch": _unit(patch), "clip_text": _unit(text),
    }  # fmt: skip
