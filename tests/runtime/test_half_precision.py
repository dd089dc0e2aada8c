"""Half precision: scores stay float32, and most of what is kept is what float32 keeps."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from PIL import Image

import sparsevlm
from eval.tasks.minivqa.dataset import rows
from tests.tiny import EARLY_DROP, inputs, llava


@pytest.fixture(scope="module")
def mini():
    """The embedded model in float32, prompts, and what float32 keeps of them, by method, once it is known."""
    model, processor = sparsevlm.load("mini")
    prompts = []
    for row in rows(0, 4):
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        prompts.append(processor(text=processor.render(row["question"], n_images=1), images=picture))
    return model.float(), prompts, {}


@torch.no_grad()
def first_stages(model, prompts, method) -> list:
    with method(model) as trace:
        for x in prompts:
            pixels = x["pixel_values"].to(model.dtype)
            model(input_ids=x["input_ids"], attention_mask=x["attention_mask"], pixel_values=pixels)
    return [record.stages[0] for record in trace.prefills]


@pytest.mark.parametrize("dtype,least", [(torch.bfloat16, 0.8), (torch.float16, 0.95)])
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
def test_kept_tokens_of_the_embedded_model(mini, name, dtype, least):
    """Measured over 12 questions at budget 192, first stage: bfloat16 .93, float16 .99 for both methods."""
    model, prompts, found = mini
    method = sparsevlm.build(name, budget=192)
    full = found[name] = found.get(name) or first_stages(model, prompts, method)
    half = first_stages(copy.deepcopy(model).to(dtype), prompts, method)
    shares = []
    for a, b in zip(full, half, strict=True):
        assert b.scores[0].dtype == torch.float32
        a, b = (set(stage.origin[0].tolist()) for stage in (a, b))
        shares.append(len(a & b) / len(a))
    assert sum(shares) / len(shares) >= least


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_batch_in_half_precision_runs_in_that_precision(dtype, options):
    """Merged tokens, caches and logits are in the model's dtype; all is finite in spite of padding."""
    model = llava(dtype=dtype)
    x, _ = inputs("ragged", model)
    with sparsevlm.build("sparsevlm", layers=(1, 3, 5), keep=(18, 10, 5), **options)(model) as trace:
        out = model(**x)
    assert out.logits.dtype == dtype and out.logits[:, -1].isfinite().all()
    assert all(layer.keys.dtype == layer.values.dtype == dtype for layer in out.past_key_values.layers)
    assert all(s.dtype == torch.float32 for stage in trace.prefills[0].stages for s in stage.scores[:2])
