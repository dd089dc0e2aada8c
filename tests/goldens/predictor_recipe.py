"""Weights and labels of the recordings of Dynamic-LLaVA in seeds/, bit for bit reproducible (see recipe.py)."""

from __future__ import annotations

import numpy as np

from tests.goldens.recipe import _draw

Weights = dict[str, np.ndarray]


def _linear(random, weights: Weights, name: str, outputs: int, inputs: int, gain: float = 1.0, bias: bool = True):
    weights[f"{name}.weight"] = _draw(random, (outputs, inputs), gain * inputs**-0.5)
    if bias:
        weights[f"{name}.bias"] = _draw(random, (outputs,), 0.1)


def _norm(random, weights: Weights, name: str, width: int):
    weights[f"{name}.weight"] = np.float32(1) + _draw(random, (width,), 0.1)
    weights[f"{name}.bias"] = _draw(random, (width,), 0.1)


def image_predictor(seed: int, hidden: int = 64, d_model=64, nhead=4, dim_feedforward=128, num_layers=2) -> Weights:
    """Weights by their names in the authors' checkpoints, below `model.image_score_predictor.`."""
    random, weights = np.random.RandomState(11000 + seed), {}
    _norm(random, weights, "down_mlp.0", hidden)
    _linear(random, weights, "down_mlp.1", d_model, hidden, 1.5)
    for i in range(num_layers):
        block = f"transformer.{i}"
        _norm(random, weights, f"{block}.norm1", d_model)
        _linear(random, weights, f"{block}.attn.qkv", 3 * d_model, d_model, 1.3, bias=False)
        _linear(random, weights, f"{block}.attn.proj", d_model, d_model)
        _norm(random, weights, f"{block}.norm2", d_model)
        _linear(random, weights, f"{block}.mlp.fc1", dim_feedforward, d_model)
        _linear(random, weights, f"{block}.mlp.fc2", d_model, dim_feedforward)
    for place, (outputs, inputs) in {0: (2, 1), 2: (4, 2)}.items():
        _linear(random, weights, f"output_mlp.{place}", d_model // outputs, d_model // inputs, 1.5)
    _linear(random, weights, "output_mlp.4", 2, d_model // 4, 1.5)
    return weights


def output_predictor(seed: int, hidden: int = 64, d_model: int = 64, **_) -> Weights:
    """The same below `model.output_text_score_predictor.`."""
    random, weights = np.random.RandomState(12000 + seed), {}
    _norm(random, weights, "output_mlp.0", hidden)
    _linear(random, weights, "output_mlp.1", d_model, hidden, 2.0)
    _linear(random, weights, "output_mlp.3", d_model // 2, d_model, 2.0)
    _linear(random, weights, "output_mlp.5", d_model // 4, d_model // 2, 2.0)
    _linear(random, weights, "output_mlp.7", 2, d_model // 4, 2.0)
    return weights
