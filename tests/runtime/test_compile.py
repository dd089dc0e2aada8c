"""torch.compile around a pruned model: the same results, and no graph per decode step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import sparsevlm
from tests.tiny import inputs, llava, same

LAYERS, KEEP = (0, 2), (18, 7)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,options,backend",
    [
        ("sparsevlm", {}, "eager"),
        ("sparsevlm", {}, "aot_eager"),
        ("sparsevlm_plus", {"early_drop": False}, "eager"),
        ("random", {}, "eager"),
        ("yopo", {"window": 3, "ffn": 0.5, "cut": 2, "removal": "masked"}, "eager"),
    ],
)
@torch.no_grad()
def test_compiled_equals_eager(name, options, backend):
    model = llava(dtype=torch.float32, layers=4)
    x, _ = inputs("one", model)
    length = x["input_ids"].shape[1]
    if name in ("random", "yopo"):
        method = sparsevlm.build(name, **options or {"budget": 9})
    else:
        method = sparsevlm.build(name, layers=LAYERS, keep=KEEP, **options)

    def steps(network):
        out = network(**x)
        yield out.logits[:, -1]
        for t in range(6):
            position = torch.tensor([[length + t]])
            token = torch.tensor([[7 + t]])
            out = network(input_ids=token, past_key_values=out.past_key_values, position_ids=position)
            yield out.logits[:, -1]

    with method(model):
        want = list(steps(model))
        compiled, count = torch.compile(model, backend=backend), []
        for got, expected in zip(steps(compiled), want, strict=True):
            same(got, expected, 1e-4)
            count.append(graphs())
    assert count[0] > 0  # something was compiled
    # the first steps specialise, then generalise over the length of the cache; afterwards nothing is compiled any more
    assert count[4] == count[5] == count[6], count
