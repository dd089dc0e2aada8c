"""The floor: the pruned run's lengths, and nothing beside the layers."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM

import sparsevlm
from sparsevlm.cost.floor import floor, lengths_after
from tests.tiny import llava, pad, prompt, text_config

LAYERS, KEEP = (1, 4), (30, 8)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(text_config()).eval()


@pytest.fixture(scope="module")
def embeds():
    return torch.randn(2, 140, 64)


def pruned_record(model, embeds):
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, 10:110] = True
    cache = DynamicCache()
    method = sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, early_drop=False)
    with torch.no_grad(), method(model, visual_mask=visual) as trace:
        model(inputs_embeds=embeds, past_key_values=cache)
    return trace.prefills[0], [layer.keys.shape[2] for layer in cache.layers]


@torch.no_grad()
def test_its_layers_see_as_many_rows_as_the_pruned_runs(model, embeds):
    record, held = pruned_record(model, embeds)
    cuts = lengths_after(record)
    assert list(cuts) == [2, 5]
    seen, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])))
    cache = DynamicCache()
    with floor(model, cuts):
        model(inputs_embeds=embeds, past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == held == seen
        assert len(set(held)) == 3
        seen.clear()
        model(inputs_embeds=embeds[:, :1], past_key_values=cache, position_ids=torch.full((2, 1), 140))
        assert seen == [1] * 8  # a decode step is left alone
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_it_adds_one_gather_per_cut_and_no_other_work(model, embeds):
    record, _ = pruned_record(model, embeds)
    with Operators() as plain:
        model(inputs_embeds=embeds)
    with floor(model, lengths_after(record)), Operators() as least:
        model(inputs_embeds=embeds)
    extra = least.names - plain.names
    assert not plain.names - least.names
    assert extra == {"index_select": 2, "arange": 2, "slice": 4}  # slices of the rotary tables are views


@torch.no_grad()
def test_it_computes_what_a_plain_forward_of_the_kept_rows_would(model, embeds):
    """Cut before layer 0, it is the model on the last rows (at the first rows' positions)."""
    with floor(model, {0: 50}):
        out = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(out, model(inputs_embeds=embeds[:, -50:]).logits)
    with floor(model, {5: 50}):
        cut = model.model(inputs_embeds=embeds).last_hidden_state
    assert cut.shape[1] == 50 and not torch.allclose(cut, model.model(inputs_embeds=embeds).last_hidden_state[:, -50:])


def test_hooks_go_and_unequal_samples_are_refused(model, embeds):
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), floor(model, {1: 3}):
        raise RuntimeError("stop")
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before
    net = llava(dtype=torch.float32)
    ids, mask = pad([prompt([5, "I", 9]), prompt([3, "I", 14])])
    with torch.no_grad(), sparsevlm.build("random", budget=12)(net) as trace:
        net(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 42, 42))
    with pytest.raises(ValueError, match="equal length"):
        lengths_after(trace.prefills[0])
