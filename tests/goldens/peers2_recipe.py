"""Weights and inputs of the recordings in peers2/, bit for bit reproducible (see recipe.py)."""

from __future__ import annotations

import numpy as np

from tests.goldens.clip_recipe import CLIP_CONFIG
from tests.goldens.recipe import CONFIGS, _draw

BEFORE, AFTER = 35, 24  # tokens of the prompt before the picture and after it
IMAGE = 100  # id of a picture's tokens, drawn nowhere
WIDTH = CLIP_CONFIG["hidden_size"]
# The end of a question has the highest id, so that both of transformers' rules for the pooled token agree.
CLIP_TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
    max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=97, eos_token_id=98, pad_token_id=1,
)  # fmt: skip
# The layers of AIM and FiCoCo-L are written for 32.
LLAMAS = CONFIGS | {"E": CONFIGS["A"] | {"num_hidden_layers": 32}}


def prompt_ids(seed: int) -> tuple[list[int], list[int]]:
    """Ids before and after the picture."""
    ids = np.random.RandomState(31000 + seed).randint(3, 100, size=BEFORE + AFTER).tolist()
    return [1, *ids[1:BEFORE]], ids[BEFORE:]


def projector(seed: int, hidden: int) -> dict[str, np.ndarray]:
    """Weights of LLaVA's projector by their names in transformers."""
    random = np.random.RandomState(32000 + seed)
    return {
        "linear_1.weight": _draw(random, (hidden, WIDTH), WIDTH**-0.5),
        "linear_1.bias": _draw(random, (hidden,), 0.05),
        "linear_2.weight": _draw(random, (hidden, hidden), hidden**-0.5),
        "linear_2.bias": _draw(random, (hidden,), 0.05),
    }


def question_ids(seed: int, words: int) -> list[int]:
    """A question in the vocabulary of the CLIP text tower, without its start and end."""
    return np.random.RandomState(33000 + seed).randint(2, 97, size=words).tolist()


def clip_text_state_dict(seed: int) -> dict[str, np.ndarray]:
    """Weights of a CLIPModel around the vision tower: text tower and both projections."""
    random, config = np.random.RandomState(34000 + seed), CLIP_TEXT
    h, m = config["hidden_size"], config["intermediate_size"]
    places = config["max_position_embeddings"]
    out = {
        "text_model.embeddings.token_embedding.weight": _draw(random, (config["vocab_size"], h), 0.6),
        "text_model.embeddings.position_embedding.weight": _draw(random, (places, h), 0.2),
    }

    def norm(name: str) -> None:
        out[f"{name}.weight"] = np.float32(1) + _draw(random, (h,), 0.1)
        out[f"{name}.bias"] = _draw(random, (h,), 0.05)

    for i in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            out[f"{layer}.self_attn.{name}.weight"] = _draw(random, (h, h), h**-0.5)
            out[f"{layer}.self_attn.{name}.bias"] = _draw(random, (h,), 0.05)
        norm(f"{layer}.layer_norm1")
        out[f"{layer}.mlp.fc1.weight"] = _draw(random, (m, h), h**-0.5)
        out[f"{layer}.mlp.fc1.bias"] = _draw(random, (m,), 0.05)
        out[f"{layer}.mlp.fc2.weight"] = _draw(random, (h, m), 0.25 * m**-0.5)
        out[f"{layer}.mlp.fc2.bias"] = _draw(random, (h,), 0.05)
        norm(f"{layer}.layer_norm2")
    norm("text_model.final_layer_norm")
    out["text_projection.weight"] = _draw(random, (WIDTH, h), h**-0.5)
    out["visual_projection.weight"] = _draw(random, (WIDTH, WIDTH), WIDTH**-0.5)
    return out


def signals(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Made-up outputs of a vision tower: states [576, 32] of layer -2, CLS attention [24, 4, 576] of every block."""
    random = np.random.RandomState(20000 + seed)
    prototypes, label = _draw(random, (18, 32), 0.6), np.zeros((24, 24), dtype=np.int64)
    for k in range(1, 18):
        y, x = random.randint(0, 22, size=2)
        height, width = random.randint(2, 9, size=2)
        label[y : y + height, x : x + width] = k
    label = label.reshape(-1)
    states = prototypes[label] + _draw(random, (576, 32), 0.3)
    _draw(random, (32, 48), 1.0), _draw(random, (576, 48), 0.25)  # the recorded projection, not needed here
    u = random.randint(1, 65536, size=(24, 4, 576)).astype(np.float32) * np.float32(2.0**-16)
    gain = (random.randint(1, 9, size=(18,)).astype(np.float32) * np.float32(0.25))[label]
    return states, (u * u * u * u * gain * np.float32(2.0**-7)).astype(np.float32)
