"""Language models with grouped queries, counted alone where visual tokens depend on the picture."""

from __future__ import annotations

import pytest

from sparsevlm.cost import flops
from sparsevlm.cost.shapes import load_config
from tests import hub_families

# width, MLP, layers, heads, key heads, head width, vocabulary: the published config.json files
SHAPES = {
    "qwen2-vl-7b": (3584, 18944, 28, 28, 4, 128, 152064),
    "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 128, 152064),
    "qwen3-vl-8b": (4096, 12288, 36, 32, 8, 128, 151936),
    "internvl3-8b": (3584, 18944, 28, 28, 4, 128, 151674),
    "llava-onevision-7b": (3584, 18944, 28, 28, 4, 128, 152000),
    "llava-next-7b": (4096, 11008, 32, 32, 32, 128, 32064),
}


def by_hand(lengths, width, mlp, layers, heads, key_heads, head, vocabulary) -> float:
    """Projections, attention and MLP of each layer, and the head on the last token, in GMACs."""
    assert len(lengths) == layers
    total = width * vocabulary
    for n in lengths:
        total += 2 * n * width * heads * head + 2 * n * width * key_heads * head + 3 * n * width * mlp
        total += 2 * n * n * heads * head
    return total / 1e9


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    c = load_config(name)
    found = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    assert (*found, head, c.vocab_size) == SHAPES[name]


@pytest.mark.parametrize("name", hub_families._SPECS)
def test_a_checkpoint_is_counted_by_hand(name, tmp_path):
    """Its language model alone; four heads and two of keys."""
    folder = str(hub_families.save(name, tmp_path / name))
    assert getattr(load_config(folder), "vision_config", None) is None
    for method, budget, visual in (("none", "full", 60), ("random", 0.25, 15)):
        counted = flops.run(folder, method, budget, 10, visual_tokens=60)
        assert counted.lengths == [visual + 10] * 5 and counted.entering == visual
        assert counted.gmacs["llm_prefill"] == pytest.approx(
            by_hand(counted.lengths, 32, 64, 5, 4, 2, 8, 512), rel=1e-9
        )
        assert counted.gmacs["vision"] == counted.gmacs["projector"] == 0
