"""Methods that drop at the input, in batches whose longest sample loses nothing."""

from __future__ import annotations

import pytest
import torch

import sparsevlm
from tests.tiny import GENERATE, llava, logits, pad, prompt, same, single


@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("name", ["random", "sparsevlm"])
def test_beside_a_longer_prompt_without_images(name, positions, monkeypatch):
    model = llava()
    torch.manual_seed(3)
    rows = [prompt([5, "I", 9]), prompt([70])]
    ids, mask = pad(rows)
    x = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, 42, 42, dtype=model.dtype)}
    if name == "random":
        method = sparsevlm.build("random", budget=9)
        monkeypatch.setattr(type(method), "positions", positions)
    else:
        method = sparsevlm.build("sparsevlm", layers=(-1, 3), keep=(9, 5), positions=positions)
    with method(model):
        out = model.generate(**x, **GENERATE)
        for b in range(2):
            same(logits(out)[b], logits(model.generate(**single(x, rows, b), **GENERATE))[0])
        same(logits(out), logits(model.generate(**x, **GENERATE, use_cache=False)))
