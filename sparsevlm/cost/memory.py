"""Memory: what a call takes at its peak, what a cache really holds, and whether a model fits at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sparsevlm.cost.shapes import Prompt

PEAK_MEASURE = {
    "cuda": "torch.cuda.max_memory_allocated above what was allocated before",
    "cpu": "largest sum of live allocations of PyTorch's CPU allocator (profiler memory events); the scratch space of "
    "matrix libraries is not in it",
}
GIB = 1 << 30


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that `call` holds at a time, above what was there before; see PEAK_MEASURE.

    The call runs once, slower than usual. On a CPU every allocation and release of the allocator is noted by torch's
    profiler, those inside operators, too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its start and stop on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def kv_bytes(cache) -> list[int]:
    """Bytes of memory that each layer of a KV cache holds: of the tensors' storages, each counted once."""
    return [
        sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in (layer.keys, layer.values))}.values())
        for layer in cache.layers
    ]


def needed_bytes(net: nn.Module, prompt: Prompt, dtype: torch.dtype, decode_tokens: int = 0) -> int:
    """Bytes that a model and one prefill of a prompt (both may be on the meta device) take at least.

    Beside the weights: the KV cache of the whole prompt, and in one layer the widest intermediate results (hidden
    states thrice, the three of the MLP).
    """
    text = getattr(net.config, "text_config", net.config)
    batch, length = prompt.visual_mask.shape
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * width * (length + decode_tokens)
    rows = length * (3 * text.hidden_size + 3 * text.intermediate_size)
    weights = sum(p.numel() for p in net.parameters())
    inputs = sum(t.numel() for t in prompt.inputs.values())
    return (weights + batch * (cache + rows) + inputs) * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device now; None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found = int(info["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container may have less than the machine; files that it has only read can be given back
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit = int((group / "memory.max").read_text())
        found = min(found, limit - used + int(statistics["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no such group, or no limit ("max")
        pass
    return found


def check_fits(what: str, needed: int, device: torch.device) -> None:
    """Refuse, before anything is allocated, what a device cannot hold.

    Raises:
        MemoryError: says how much is missing.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs {needed / GIB:.1f} GiB on {device}, {free / GIB:.1f} GiB are free: "
            f"{(needed - free) / GIB:.1f} GiB are missing. Use a smaller dtype, batch or shape, or another device"
        )
