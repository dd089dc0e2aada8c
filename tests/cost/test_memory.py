"""Memory: what is measured is what the allocator did, and what cannot fit is refused before anything is allocated."""

import pytest
import torch
from transformers import LlamaForCausalLM

import sparsevlm
from sparsevlm.cost import memory, networks
from sparsevlm.cost.harness import Harness, is_out_of_memory
from sparsevlm.cost.shapes import make_prompt
from tests import tiny

CPU = torch.device("cpu")
MIB = 1 << 20


def test_the_peak_is_what_was_alive_at_once():
    def call():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(5 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(MIB, dtype=torch.uint8)  # 3 + 5 is more than 5 + 1
        return second, third

    assert memory.peak_bytes(call, CPU) == 8 * MIB
    kept = torch.empty(MIB, dtype=torch.uint8)
    assert memory.peak_bytes(lambda: kept.max(), CPU) < MIB  # what was there before does not count


def test_temporaries_inside_operators_count():
    """Softmax attention over a mask makes, inside one operator, what no Python code sees."""
    q = torch.randn(1, 4, 512, 16)
    output = q.numel() * 4
    assert memory.peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), CPU) > output


@pytest.mark.parametrize(("method", "options"), [("none", {}), ("sparsevlm", {"layers": (1, 4), "keep": (20, 6)})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caches_bytes_are_those_of_its_tokens(method, options, dtype):
    """Grouped-query attention: 2 heads of 16, keys and values."""
    model = LlamaForCausalLM(tiny.text_config()).to(dtype).eval()
    prompt = make_prompt(model.config, 20, 3, dtype=dtype, before=8, visual_tokens=100)
    facts = Harness(model, [(method, None, options)], prompt).inspect(1)
    bytes_per_token = 2 * 2 * 16 * dtype.itemsize
    held = facts.lengths  # the cache of a pruning layer is whole: its keys and values were read
    assert facts.kv_bytes == [3 * n * bytes_per_token for n in held]
    assert (min(held) < max(held)) == (method == "sparsevlm")
    assert facts.peak_bytes > sum(facts.kv_bytes)


def test_a_pruned_prefill_takes_less_memory_than_the_unpruned():
    model = LlamaForCausalLM(tiny.text_config()).eval()
    harness = Harness(model, [("sparsevlm", 32, {})], make_prompt(model.config, 20))
    assert harness.inspect(1).peak_bytes < harness.inspect(0).peak_bytes


def test_storage_that_is_kept_alive_counts():
    """A cache of views holds the tensors they look into."""
    model = LlamaForCausalLM(tiny.text_config()).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    whole = memory.kv_bytes(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
    assert memory.kv_bytes(cache) == whole


@pytest.mark.parametrize("shape", ["llama-64x4", "mini"])
def test_what_is_needed_is_a_lower_bound_near_the_truth(shape):
    layout, batch = (8, 576, 20), 2
    net = networks.network(shape, torch.float32, CPU)
    prompt = make_prompt(net.config, 28, batch, before=8)
    weights = sum(p.nbytes for p in net.parameters())
    inputs = sum(t.nbytes for t in prompt.inputs.values())
    found = weights + inputs + Harness(net, [], prompt, 2).inspect(0).peak_bytes
    needed = networks.needed(shape, layout, batch, torch.float32, 2)
    assert 0.7 * found < needed < 1.3 * found
    assert networks.size(shape) * 4 == weights


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5 * memory.GIB)
    needed = networks.needed("llava-1.5-7b", (35, 576, 25), 1, torch.bfloat16, 8)
    assert 13.2 < needed / memory.GIB < 14.2  # 7.06e9 weights of 2 bytes, and some
    with pytest.raises(MemoryError, match=r"needs 13\.\d GiB on cpu, 5\.0 GiB are free: 8\.\d GiB are missing"):
        memory.check_fits("llava-1.5-7b", needed, CPU)
    memory.check_fits("a small one", 4 * memory.GIB, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    memory.check_fits("where nobody knows", needed, CPU)


def test_an_allocator_that_fails_is_known_by_its_error():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as failed:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(failed.value)


def test_free_memory_is_what_the_system_says():
    free = memory.free_bytes(CPU)
    assert free is None or 0 < free < 1 << 50


def test_random_networks_are_made_in_their_dtype_and_shape():
    net = networks.network("llama-128x3x4", torch.bfloat16, CPU, "eager")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    assert len(net.model.layers) == 3 and net.config.num_attention_heads == 4
    assert net.config._attn_implementation == "eager" and not net.training
    with torch.no_grad(), sparsevlm.build("sparsevlm", budget=64)(net, torch.arange(600)[None] < 576):
        out = net(inputs_embeds=torch.randn(1, 600, 128, dtype=torch.bfloat16), logits_to_keep=1)
    assert out.logits.isfinite().all()


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_allocators():
    device = torch.device("cuda")
    assert memory.peak_bytes(lambda: torch.empty(8 * MIB, dtype=torch.uint8, device=device), device) == 8 * MIB
