"""YOPO against attention written out, in both forms, and what it refuses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sparsevlm
from tests.tiny import IMAGE, inputs, llava, same

LAYERS, HEADS, SIDE = 8, 4, 6
WHOLE = {"window": None, "causal_window": False, "heads": None, "ffn": 1.0, "cut": None}
ONE = [{"window": 3}, {"window": 5, "causal_window": True}, {"heads": "mask"}, {"ffn": 0.5}, {"cut": 3}]
ALL = {"window": 3, "heads": "mask", "ffn": 0.3, "cut": 5}


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    """A file of heads: the first layers whole, one layer without any, others mixed within groups of two."""
    kept = np.random.RandomState(0).rand(LAYERS, HEADS) < 0.5
    kept[:2], kept[3] = True, False
    kept[2] = [True, False, False, False]
    np.save(path := tmp_path_factory.mktemp("heads") / "mask.npy", kept)
    return str(path)


def options_of(options: dict, mask: str) -> dict:
    return options | ({"heads": mask} if "heads" in options else {})


def merged_embeddings(model, x) -> torch.Tensor:
    found = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.update(kwargs), with_kwargs=True
    )
    model(**x)
    hook.remove()
    return found["inputs_embeds"]


@torch.no_grad()
def by_hand(model, x, removal, window, causal_window, heads, ffn, cut) -> torch.Tensor:
    """[L, V] logits of one prompt without padding: every head of every layer written out."""
    decoder, visual = model.model.language_model, x["input_ids"][0] == IMAGE
    hidden, length = merged_embeddings(model, x)[0], len(visual)
    kept = np.ones((LAYERS, HEADS), bool) if heads is None else np.load(heads)
    position = torch.arange(length)
    allowed = position[:, None] >= position
    picture = (visual.long().diff(prepend=torch.zeros(1)) == 1).cumsum(0)
    if window is not None:
        for p in range(1, int(picture.max()) + 1):
            rows = (visual & (picture == p)).nonzero()[:, 0].tolist()
            for (i, a), (j, b) in product(enumerate(rows), enumerate(rows)):
                near = abs(i // SIDE - j // SIDE) <= window // 2 and abs(i % SIDE - j % SIDE) <= window // 2
                allowed[a, b] = near and (b <= a or not causal_window)
    cos, sin = decoder.rotary_emb(hidden, position[None])
    for n, layer in enumerate(decoder.layers):
        attention, y = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            p(y).view(1, length, -1, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        gone = cut is not None and n >= cut
        made = []
        for h in range(HEADS):
            scores, sees = (q[0, h] @ k[0, h // 2].T) / 4, allowed.clone()
            if removal == "real" and (gone or not kept[n, h]):
                sees[:, visual] = False
                sees |= torch.eye(length, dtype=torch.bool)  # of rows that nobody reads
            weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
            if gone or not kept[n, h]:
                weights = weights * ~visual
            out = weights @ v[0, h // 2]
            made.append(out if kept[n, h] else out * ~visual[:, None])
        hidden = hidden + attention.o_proj(torch.stack(made, 1).flatten(1))
        y, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        inner = mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)
        late = torch.arange(inner.shape[-1]) >= int(inner.shape[-1] * ffn)
        hidden = hidden + mlp.down_proj(inner.masked_fill(visual[:, None] & late, 0))
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("kind", ["one", "multi"])
@pytest.mark.parametrize("removal", ["masked", "real"])
@pytest.mark.parametrize("options", [*ONE, ALL], ids=str)
@torch.no_grad()
def test_every_reduction_written_out(options, removal, kind, mask):
    model = llava()
    x, _ = inputs(kind, model)
    options = options_of(options, mask)
    want = by_hand(model, x, removal, **WHOLE | options)
    with sparsevlm.build("yopo", removal=removal, **options)(model):
        got = model(**x).logits[0]
    text = x["input_ids"][0] != IMAGE
    same(got[text], want[text])
    assert not torch.allclose(got[-1], model(**x).logits[0, -1])  # it does something
