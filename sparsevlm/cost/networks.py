"""Models to time: the embedded ones, and any shape with random weights, since latency does not depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from transformers import PretrainedConfig

from sparsevlm.cost import memory
from sparsevlm.cost.shapes import load_config, make_prompt, model_class
from sparsevlm.models.checkpoint import EMBEDDED


@lru_cache(maxsize=4)
def skeleton(shape: str) -> nn.Module:
    """The model without weights, on the meta device."""
    config = load_config(shape)
    with torch.device("meta"):
        return model_class(config)(config).eval()


def size(shape: str) -> int:
    """Number of weights."""
    return sum(p.numel() for p in skeleton(shape).parameters())


def needed(shape: str, layout: Sequence[int], batch_size: int, dtype: torch.dtype, decode_tokens: int) -> int:
    """Bytes that `network` and one prefill take at least; `layout` is text, visual tokens, text."""
    net, (before, visual, after) = skeleton(shape), layout
    prompt = make_prompt(net.config, before + after, batch_size, "meta", dtype, before=before, visual_tokens=visual)
    return memory.needed_bytes(net, prompt, dtype, decode_tokens)


def network(shape: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> nn.Module:
    """A model of this shape, ready to be timed.

    Args:
        shape: "mini" (with its weights), or a name of `shapes.load_config` (with random ones; no checkpoint is read).
        dtype: of weights and computation.
        device: where it is made.
        attention: "sdpa", "eager", "flash_attention_2", ... as transformers names them.

    Raises:
        ValueError: unknown shape.
        ImportError: FlashAttention is asked for and not installed.
    """
    if shape in EMBEDDED:
        import sparsevlm

        return sparsevlm.load(shape, dtype=dtype, device=device, attn_implementation=attention)[0]
    return _random(load_config(shape), dtype, device, attention)


def _random(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in the dtype it shall have: a float32 copy may not fit
    torch.manual_seed(0)
    try:
        with torch.device(device):
            return model_class(config)(config).eval()
    finally:
        torch.set_default_dtype(before)
