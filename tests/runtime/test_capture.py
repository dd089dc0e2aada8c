"""What capturing a pruned prefill in a CUDA graph needs: it is the same operators whatever the prompt says.

A graph replays recorded operators on new data, so none may depend on a value that the host has read, and nothing may be
copied from host memory on the way. Where the visual tokens are is told beforehand (`visual_mask`).
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import sparsevlm
from tests.runtime.test_overhead import FORMS, LAYERS, METHODS, example, tiny

pytestmark = pytest.mark.filterwarnings("ignore:SparseVLM")


class HostCopies(TorchFunctionMode):
    """Counts tensors that are made of values on the host, or copied from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.tensor and out.numel():
            self.counts["tensor"] += 1
        elif isinstance(out, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            self.counts[func.__name__] += args[0].device.type == "cpu" != out.device.type
        return out


@pytest.mark.parametrize(
    "name,early_drop,rows",
    [("sparsevlm", True, 1), ("sparsevlm", False, 2), ("centre", True, 2), ("plus", True, 1)],
)
@torch.no_grad()
def test_recorded_operators_replay_on_another_prompt(name, early_drop, rows):
    model = tiny(layers=7)
    embeds, visual = example(rows)
    other = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(9))

    def prefill(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(inputs_embeds=x)
        return out.logits, *(layer.keys for layer in out.past_key_values.layers)

    with METHODS[name](early_drop=early_drop)(model, visual_mask=visual) as trace:
        recorded = make_fx(prefill)(embeds)
        want = [prefill(x) for x in (embeds, other)]
        kept = [p.stages[0].kept[0].tolist() for p in trace.prefills[1:]]
    assert kept[0] != kept[1]  # what is kept is decided in the replay, not in the recording
    for x, outputs in zip((embeds, other), want, strict=True):
        for a, b in zip(recorded(x), outputs, strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_counts_that_depend_on_the_picture_cannot_be_recorded():
    model = tiny(layers=7)
    embeds, visual = example()
    method = sparsevlm.build("sparsevlm_rank", layers=LAYERS)
    with method(model, visual_mask=visual), pytest.raises(RuntimeError, match="tracing tensor"):
        make_fx(lambda x: model(inputs_embeds=x).logits)(embeds)


@pytest.mark.parametrize("name,options", FORMS)
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_nothing_is_copied_from_the_host(name, options, rows):
    model = tiny(device="meta")
    embeds, visual = example(rows)
    embeds = embeds.to("meta")
    with METHODS[name](**options)(model, visual_mask=visual), HostCopies() as copies:
        model(inputs_embeds=embeds)
    assert not +copies.counts, copies.counts


@torch.no_grad()
def test_copies_of_a_ragged_batch_are_counted():
    model = tiny(device="meta")
    embeds, visual = example(2)
    visual[1, 100:130] = False
    embeds = embeds.to("meta")
    with METHODS["sparsevlm"]()(model, visual_mask=visual), HostCopies() as copies:
        model(inputs_embeds=embeds)
    assert copies.counts["to"] and copies.counts["tensor"], copies.counts
