"""Weights and inputs of the recorded runs: bit for bit the same on any platform, from numpy's frozen RandomState.

Everything is drawn as 16-bit integers and scaled in float32; `sha256_of` tells whether an array is the recorded one.
"""

from __future__ import annotations

import hashlib

import numpy as np

_BASE = {
    "num_hidden_layers": 17,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 101,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
_WIDE = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 128}
# names of the recordings -> arguments of LlamaConfig
CONFIGS = {
    "A": _BASE,
    "B": _BASE | _WIDE | {"rope_theta": 1e12},  # theta so large that the kernel of SparseVLM+ stays positive
    "Bp": _BASE | _WIDE,  # the ordinary theta: the kernel crosses zero and scores change their sign
    "C": _BASE | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "D": _BASE | {"num_hidden_layers": 21},  # v1.0 prunes after layer 19, too
}
# Standard deviations times sqrt(fan in), the embedding's as it is: attention far from uniform, states of order one.
_STD = {"qk": 1.35, "v": 1.0, "o": 0.30, "gate": 1.0, "up": 1.0, "down": 0.25, "head": 1.0, "embed": 0.5}


def _draw(random: np.random.RandomState, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Uniform float32 of a given standard deviation in exactly representable steps."""
    integers = random.randint(0, 65536, size=shape).astype(np.float32) - np.float32(32767.5)
    return (integers * np.float32(float(std) * 3**0.5 / 32767.5)).astype(np.float32)


def llama_state_dict(config: str, seed: int, qk_scale: float = 1.0) -> dict[str, np.ndarray]:
    """Weights by their names in transformers; `qk_scale` < 1 flattens the attention."""
    c = CONFIGS[config]
    random = np.random.RandomState(1000 + seed)
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = c["num_key_value_heads"] * (hidden // c["num_attention_heads"])
    unit = hidden**-0.5
    out = {"model.embed_tokens.weight": _draw(random, (vocab, hidden), _STD["embed"])}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out[p + "self_attn.q_proj.weight"] = _draw(random, (hidden, hidden), _STD["qk"] * unit * qk_scale)
        out[p + "self_attn.k_proj.weight"] = _draw(random, (kv, hidden), _STD["qk"] * unit * qk_scale)
        out[p + "self_attn.v_proj.weight"] = _draw(random, (kv, hidden), _STD["v"] * unit)
        out[p + "self_attn.o_proj.weight"] = _draw(random, (hidden, hidden), _STD["o"] * unit)
        out[p + "mlp.gate_proj.weight"] = _draw(random, (inner, hidden), _STD["gate"] * unit)
        out[p + "mlp.up_proj.weight"] = _draw(random, (inner, hidden), _STD["up"] * unit)
        out[p + "mlp.down_proj.weight"] = _draw(random, (hidden, inner), _STD["down"] * inner**-0.5)
        out[p + "input_layernorm.weight"] = np.float32(1) + _draw(random, (hidden,), 0.1)
        out[p + "post_attention_layernorm.weight"] = np.float32(1) + _draw(random, (hidden,), 0.1)
    out["model.norm.weight"] = np.float32(1) + _draw(random, (hidden,), 0.1)
    out["lm_head.weight"] = _draw(random, (vocab, hidden), _STD["head"] * unit)
    return out


def inputs_embeds(config: str, seed: int, before: int, n_visual: int, n_text: int) -> np.ndarray:
    """[1, before + n_visual + n_text, hidden]: a system prompt, visual tokens, text.

    Visual tokens mix 24 prototypes with noise, so that clustering has something to find; text tokens differ in norm, so
    that the choice of raters is not trivial.
    """
    hidden = CONFIGS[config]["hidden_size"]
    random = np.random.RandomState(5000 + seed)
    prototypes = _draw(random, (24, hidden), 0.6 * 0.7)
    label = random.randint(0, 24, size=n_visual)
    visual = prototypes[label] + _draw(random, (n_visual, hidden), 0.6 * 0.5)
    amplitude = random.randint(1, 33, size=(n_text, 1)).astype(np.float32) / np.float32(16.0)
    text = _draw(random, (n_text, hidden), 0.6) * amplitude
    system = _draw(random, (before, hidden), 0.6)
    return np.concatenate([system, visual, text], 0)[None].astype(np.float32)


def sha256_of(arrays: dict[str, np.ndarray] | np.ndarray) -> str:
    """Hash of an array, or of a dict of them in order of their names."""
    digest = hashlib.sha256()
    if isinstance(arrays, dict):
        for name in sorted(arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    else:
        digest.update(np.ascontiguousarray(arrays).tobytes())
    return digest.hexdigest()
