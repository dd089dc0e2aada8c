"""Forwards on the meta device, where tensors have shapes and no values, and two counters of their multiply-adds.

fvcore's is the one that results come from. torch's own needs nothing but torch, for machines without fvcore; tests hold
the two against each other. Both book what is done inside `runtime.parts.part(...)` as METHOD, or as GUIDE what a second
model computes, and under no submodule, wherever it is done: in a vision tower, a projector or the language model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from sparsevlm.cost.shapes import load_config, model_class
from sparsevlm.runtime.parts import GUIDE, watch

TOWERS = ("vision_tower", "video_tower", "image_tower")
PROJECTOR = "multi_modal_projector"
METHOD = "method"  # what pruning itself computes, in the counts by submodule; GUIDE: what its second model does


class Prefill(nn.Module):
    """A forward over tensors in a fixed order; also returns every product in it, so that none looks unused to a tracer.

    Unused are CLIP's last layer, whose output LLaVA-1.5 never reads, and the calls of one token in whose place a method
    computes a layer; they run all the same. After a call `cache` holds what it left.
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.net, self.names = net, names
        self.cache = None

    def forward(self, *tensors: torch.Tensor):
        with _Products() as products:
            out = self.net(**dict(zip(self.names, tensors, strict=True)), use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits, *products.made


class _Products(TorchFunctionMode):
    """Keeps the outputs of the matrix products that are called inside the block."""

    names: ClassVar = {"linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "scaled_dot_product_attention"}

    def __init__(self):
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", None) in self.names:
            self.made.append(out)
        return out


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

    Patch convolutions, also those of a second model, become unfold + linear (on meta, their shape check fails under the
    tracer), and the library's comparison of image tokens with image features, which reads a value, is switched off by
    its own variable.
    """
    variable = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(variable)
    original, nn.Conv2d.forward = nn.Conv2d.forward, _as_linear
    os.environ[variable] = "1"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            yield
    finally:
        nn.Conv2d.forward = original
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _as_linear(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The forward of a convolution whose stride is its kernel, as a linear layer over patches."""
    if conv.stride != conv.kernel_size or conv.padding not in ((0, 0), "valid") or conv.groups != 1:
        raise ValueError(f"cannot count {conv}: only patch embeddings (stride = kernel, no padding) are known")
    k = conv.kernel_size[0]
    b, c, h, w = (int(s) for s in x.shape)
    patches = x.reshape(b, c, h // k, k, w // k, k).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * k * k)
    out = F.linear(patches, conv.weight.flatten(1), conv.bias)
    return out.transpose(1, 2).reshape(b, -1, h // k, w // k)


def fvcore_gmacs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Mapping[str, float]:
    """GMACs per submodule ("" = all) without METHOD and GUIDE, and of these two, by fvcore.

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
    for name in ("layer_norm", "adaptive_avg_pool2d"):  # no products; None would leave fvcore's own handle
        analysis.set_op_handle(f"aten::{name}", lambda inputs, outputs: 0)
    for name, handle in list(analysis._op_handles.items()):
        analysis.set_op_handle(name, partial(_booked, handle))
    with watch(_scope):
        found = analysis.by_module_and_operator()
    macs = {name: sum(v for op, v in ops.items() if op not in _SCOPES) for name, ops in found.items()}
    added = {name: found[""].get(name, 0) for name in (METHOD, GUIDE)}
    return {name: value / 1e9 for name, value in {**macs, "": sum(found[""].values()), **added}.items()}


@contextmanager
def _scope(name: str | None) -> Iterator[None]:
    """Write into the traced graph that a part begins and ends.

    A scope's name ends with the module that fvcore books it under: after the slash there is none, that is the root.
    """
    tracer = torch._C._get_tracing_state()
    if tracer is None:
        yield
        return
    tracer.push_scope(f"#{_booked_as(name) or 'model'}/")
    try:
        yield
    finally:
        tracer.pop_scope()


_SCOPES = (METHOD, GUIDE)


def _booked_as(part: str | None) -> str | None:
    """What a part of `runtime.parts` is booked as; None = as the model's own."""
    return part if part in (None, GUIDE) else METHOD


def _booked(handle: Callable, inputs, outputs) -> Counter[str]:
    """What a handle of fvcore counts, under METHOD or GUIDE if the innermost part that the operator stands in is so."""
    counted = handle(inputs, outputs)
    found = counted if isinstance(counted, Counter) else Counter({outputs[0].node().kind(): counted})
    parts = [scope[1:] for scope in outputs[0].node().scopeName().split("/") if scope.startswith("#")]
    return Counter({parts[-1]: sum(found.values())}) if parts and parts[-1] in _SCOPES else found


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
    """GMACs of the whole call (""), METHOD, GUIDE and each submodule, by torch's counter (two FLOPs per multiply-add).

    Only for meta tensors: on a CPU, torch 2.13 has no rule for the attention kernel and would leave it out.
    """
    if any(t.device.type != "meta" for t in inputs):
        raise ValueError("torch's counter knows no CPU attention: give tensors on the meta device")
    with FlopCounterMode(display=False) as counter, watch(_Callers(counter.mod_tracker)):
        module(*inputs)
    root = type(module).__name__
    macs = {name.removeprefix(root).removeprefix("."): sum(ops.values()) / 2e9
            for name, ops in counter.get_flop_counts().items() if name != "Global"}  # fmt: skip
    names = [*_SCOPES, *(name for name, _ in module.named_modules())]
    return {name: macs.get(name, 0.0) for name in names} | {"": counter.get_total_flops() / 2e9}


class _Callers:
    """Lets torch's counter book a part under METHOD or GUIDE instead of the modules that are being called."""

    def __init__(self, tracker):
        self.tracker, self.callers = tracker, None

    @contextmanager
    def __call__(self, name: str | None) -> Iterator[None]:
        before, outermost = self.tracker.parents, self.callers is None
        if outermost:
            self.callers = before
        self.tracker.parents = {*self.callers} if name is None else {"Global", _booked_as(name)}
        try:
            yield
        finally:
            self.tracker.parents = before
            self.callers = None if outermost else self.callers
