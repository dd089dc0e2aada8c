"""Forwards on the meta device, where tensors have shapes and no values, and two counters of their multiply-adds.

fvcore's is the one that results come from. torch's own needs nothing but torch, for machines without fvcore; tests hold
the two against each other.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from sparsevlm.cost.shapes import load_config, model_class

TOWERS = ("vision_tower", "video_tower", "image_tower")
PROJECTOR = "multi_modal_projector"


class Prefill(nn.Module):
    """A forward over tensors in a fixed order; also returns what the towers made, so that no layer looks unused.

    After a call `cache` holds what it left.
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.net, self.names = net, names
        self.cache = None

    def forward(self, *tensors: torch.Tensor):
        seen: list[torch.Tensor] = []
        hooks = [
            getattr(self.net.model, tower).register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
            for tower in tower_names(self.net)
        ]
        try:
            out = self.net(**dict(zip(self.names, tensors, strict=True)), use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        self.cache = out.past_key_values
        return out.logits, *seen


class Decode(nn.Module):
    """One token after the prompt, on the cache that a prefill left."""

    def __init__(self, net: nn.Module, cache):
        super().__init__()
        self.net, self.cache = net, cache

    def forward(self, input_ids: torch.Tensor):
        return self.net(input_ids=input_ids, past_key_values=self.cache, use_cache=True).logits


def tower_names(net: nn.Module) -> list[str]:
    """Attributes of `net.model` that are vision towers; none for a text model."""
    return [name for name in TOWERS if hasattr(net.model, name)]


@lru_cache(maxsize=2)
def meta_model(model: str) -> nn.Module:
    """A model of `shapes.load_config` in float16 without weights."""
    return without_weights(load_config(model), torch.float16)


def without_weights(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A network of this configuration on the meta device, with SDPA."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        net = model_class(config)(config).eval()
    net = net.to(dtype)
    decoder = getattr(net.model, "language_model", net.model)
    # SparseVLM+ works out its kernel on the host, from the true frequencies
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    return net


@contextmanager
def countable(net: nn.Module) -> Iterator[None]:
    """Let a forward run on meta tensors under a tracer, with the same products.

    The patch convolution becomes unfold + linear (on meta, its shape check fails under the tracer), and the library's
    comparison of image tokens with image features, which reads a value, is switched off by its own variable.
    """
    variable = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(variable)
    patched = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    for module in patched:
        module.forward = _as_linear(module)
    os.environ[variable] = "1"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            yield
    finally:
        for module in patched:
            del module.forward
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _as_linear(conv: nn.Conv2d) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a convolution whose stride is its kernel, as a linear layer over patches."""
    if conv.stride != conv.kernel_size or conv.padding not in ((0, 0), "valid") or conv.groups != 1:
        raise ValueError(f"cannot count {conv}: only patch embeddings (stride = kernel, no padding) are known")
    k = conv.kernel_size[0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = (int(s) for s in x.shape)
        patches = x.reshape(b, c, h // k, k, w // k, k).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * k * k)
        out = F.linear(patches, conv.weight.flatten(1), conv.bias)
        return out.transpose(1, 2).reshape(b, -1, h // k, w // k)

    return forward


def fvcore_gmacs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Mapping[str, float]:
    """GMACs per submodule ("" = all), by fvcore.

    Raises:
        ImportError: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError("counting needs fvcore: pip install fvcore") from error
    analysis = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_macs)
    analysis.set_op_handle("aten::matmul", _matmul_macs)
    analysis.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)  # None would leave fvcore's own handle
    return {name: macs / 1e9 for name, macs in analysis.by_module().items()}


def _sdpa_macs(inputs, outputs) -> int:
    """QK^T and PV, which fvcore has no handle for. Grouped keys are repeated by the kernel: queries' heads count."""
    from fvcore.nn.jit_handles import get_shape

    batch, heads, queries, width = get_shape(inputs[0])
    return batch * heads * queries * get_shape(inputs[1])[2] * (width + get_shape(inputs[2])[3])


def _matmul_macs(inputs, outputs) -> int:
    """Each entry of the product takes as many as the first factor is wide; fvcore's own handle ignores broadcasting."""
    from fvcore.nn.jit_handles import get_shape

    return math.prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def torch_gmacs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """GMACs of the whole call ("") and of each submodule, by torch's counter (two FLOPs per multiply-add).

    Only for meta tensors: on a CPU, torch 2.13 has no rule for the attention kernel and would leave it out.
    """
    if any(t.device.type != "meta" for t in inputs):
        raise ValueError("torch's counter knows no CPU attention: give tensors on the meta device")
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    root = type(module).__name__
    macs = {name.removeprefix(root).removeprefix("."): sum(ops.values()) / 2e9
            for name, ops in counter.get_flop_counts().items() if name != "Global"}  # fmt: skip
    return {name: macs.get(name, 0.0) for name, _ in module.named_modules()} | {"": counter.get_total_flops() / 2e9}
