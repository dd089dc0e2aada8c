"""Multiply-adds of a pruned model, counted by fvcore on the meta device: no weights, no GPU, seconds.

    python -m sparsevlm.cost.flops --model llava-1.5-7b --text-tokens 118

What is counted: the matrix products (linear layers, QK^T and PV of attention, patch embedding, and the pruning method's
own: rater choice, rater rows, clustering, merging) of one unmodified forward pass with the method's hooks in place.
What is not: element-wise work, norms, softmax, rotary embedding, sorting. No credit is taken for causality: attention
over n tokens counts n x n, in the scores and in their product with the values, as the paper's formula does.

Units: GMACs. fvcore, and the "TFLOPs" of the SparseVLM paper, count one multiply-add as one; 1 MAC = 2 FLOPs.
Every layer that a real forward runs is counted, also CLIP's last one, whose output LLaVA-1.5 never reads (8 GMAC for an
image of 336 pixels; a tracer that removes dead code misses it).
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, VideoLlavaForConditionalGeneration

from sparsevlm import methods
from sparsevlm.cost.shapes import PUBLISHED, load_config, make_prompt
from sparsevlm.methods import build

PARTS = ("llm_prefill", "vision", "projector", "decode")


def count(
    model: str = "llava-1.5-7b",
    method: str = "none",
    budget: int | str | None = "full",
    text_tokens: int = 118,
    **method_options,
) -> dict[str, float]:
    """Count the multiply-adds of one image (or one video of 8 frames) and its prompt, at batch 1.

    Args:
        model: "llava-1.5-7b", "llava-1.5-13b", "video-llava-7b", "mini", or a folder that holds a config.json.
        method: one of `sparsevlm.methods()`.
        budget: mean visual tokens per layer, or "full"; None where the method's own options say how many stay.
        text_tokens: all tokens that are not visual. 118 reproduces the paper's column (4.62 TMAC unpruned).
        **method_options: passed on to the method.

    Returns:
        GMACs (1 MAC = 2 FLOPs) of `vision` (tower), `projector`, `llm_prefill` (decoder layers, the pruning method,
        and the head on the last token) and `decode` (one token after the prompt, head included).

    Raises:
        ValueError: unknown model, method or option; a method whose kept counts depend on the picture.
        ImportError: fvcore is not installed.
    """
    return _run(model, method, budget, text_tokens, method_options)[0]


def formula_gmacs(lengths: Sequence[int], hidden_size: int, intermediate_size: int) -> float:
    """The paper's closed formula: sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m, in GMACs.

    For multi-head attention (no grouped keys), SwiGLU, no output head.

    Args:
        lengths: all tokens n, visual and text, entering each decoder layer.
        hidden_size: d.
        intermediate_size: m.
    """
    d, m = hidden_size, intermediate_size
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in lengths) / 1e9


def lengths_entering(prefill, sample: int = 0) -> list[int]:
    """All tokens, visual and text, that enter each decoder layer, from a record of the trace (`trace.prefills[i]`)."""
    lengths = [prefill.n_tokens[sample]] * prefill.n_layers
    for stage in prefill.stages:
        dropped = stage.tokens_in[sample] - stage.tokens_out[sample]
        for layer in range(stage.layer + 1, prefill.n_layers):
            lengths[layer] -= dropped
    return lengths


def _run(model: str, method: str, budget, text_tokens: int, options: dict) -> tuple[dict[str, float], object]:
    """GMACs and the trace's record of the prefill (None if nothing was pruned)."""
    pruner = build(method, budget=budget, **options)
    if pruner.adaptive:
        raise ValueError(
            f"method {method!r} with {options or 'its defaults'} keeps as many tokens as the picture asks for: without "
            "running it they are unknown. Count a fixed schedule (layers=..., keep=...) of the counts it reached"
        )
    config = load_config(model)
    net = _meta_model(model)
    prompt = make_prompt(config, text_tokens, device="meta", dtype=net.dtype)
    step = torch.empty(1, 1, dtype=torch.long, device="meta")
    prefill, decode = _Prefill(net), _Decode(net)
    with _countable(net), pruner(net, visual_mask=prompt.visual_mask) as trace:
        by_module = _gmacs(prefill, tuple(prompt.inputs.values()))
        decode.cache = prefill.cache
        per_token = _gmacs(decode, (step,))[""]
    towers = sum(by_module[f"net.model.{name}"] for name in _tower_names(net))
    projector = by_module["net.model.multi_modal_projector"]
    parts = {
        "llm_prefill": by_module[""] - towers - projector,
        "vision": towers,
        "projector": projector,
        "decode": per_token,
    }
    return parts, (trace.prefills[0] if trace.prefills else None)


class _Prefill(nn.Module):
    """A forward over tensors in a fixed order; also returns what the towers made, so that no layer looks unused."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.cache = None

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor):
        name = "pixel_values_videos" if pixels.dim() == 5 else "pixel_values"
        seen: list[torch.Tensor] = []
        hooks = [
            getattr(self.net.model, tower).register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
            for tower in _tower_names(self.net)
        ]
        try:
            out = self.net(input_ids=input_ids, **{name: pixels}, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        self.cache = out.past_key_values
        return out.logits, *seen


class _Decode(nn.Module):
    """One token after the prompt, on the cache that the prefill left."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.cache = None

    def forward(self, input_ids: torch.Tensor):
        return self.net(input_ids=input_ids, past_key_values=self.cache, use_cache=True).logits


def _tower_names(net: nn.Module) -> list[str]:
    return [name for name in ("vision_tower", "video_tower", "image_tower") if hasattr(net.model, name)]


@lru_cache(maxsize=2)
def _meta_model(model: str) -> nn.Module:
    config = load_config(model)
    cls = VideoLlavaForConditionalGeneration if config.model_type == "video_llava" else LlavaForConditionalGeneration
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        net = cls(config).eval()
    net = net.to(torch.float16)
    decoder = net.model.language_model  # SparseVLM+ works out its kernel on the host, from the true frequencies
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    return net


@contextmanager
def _countable(net: nn.Module) -> Iterator[None]:
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


def _gmacs(module: nn.Module, inputs: tuple[torch.Tensor, ...]):
    """GMACs per submodule ("" = all), by fvcore."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError("counting needs fvcore: pip install fvcore") from error
    analysis = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_macs)
    analysis.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)  # None would leave fvcore's own handle
    return {name: macs / 1e9 for name, macs in analysis.by_module().items()}


def _shape(value) -> list[int]:
    from fvcore.nn.jit_handles import get_shape

    return get_shape(value)


def _sdpa_macs(inputs, outputs) -> int:
    """QK^T and PV, which fvcore has no handle for. Grouped keys are repeated by the kernel: queries' heads count."""
    batch, heads, queries, width = _shape(inputs[0])
    return batch * heads * queries * _shape(inputs[1])[2] * (width + _shape(inputs[2])[3])


def table(
    models: Sequence[str], method_names: Sequence[str], budgets: Sequence[int | str], text_tokens: int
) -> list[dict[str, object]]:
    """One row per model, method and budget; "none" has one row, at "full", and the others none there.

    Returns:
        Rows with `model`, `method`, `budget`, `entering`, `leaving` (mean visual tokens per layer), the four counts of
        :func:`count` in GMACs, and `saved_percent`, the LLM prefill's saving against the unpruned model.
    """
    rows = []
    for model in models:
        full = None
        for method in method_names:
            for budget in ["full"] if method == "none" else [b for b in budgets if b != "full"]:
                parts, prefill = _run(model, method, budget, text_tokens, {})
                if full is None:
                    full = parts if method == "none" else count(model, text_tokens=text_tokens)
                visual = make_prompt(load_config(model), text_tokens, device="meta").visual_tokens
                rows.append({
                    "model": model,
                    "method": method,
                    "budget": budget,
                    "entering": prefill.entering[0] if prefill else float(visual),
                    "leaving": prefill.leaving[0] if prefill else float(visual),
                    **parts,
                    "saved_percent": 100 * (1 - parts["llm_prefill"] / full["llm_prefill"]),
                })  # fmt: skip
    return rows


def render(rows: Sequence[dict[str, object]], text_tokens: int) -> str:
    """The rows of :func:`table` as a Markdown table."""
    head = ["model", "method", "budget", "entering", "leaving", "LLM prefill GMAC", "GFLOP", "saved", "vision GMAC",
            "projector GMAC", "decode GMAC/token"]  # fmt: skip
    lines = [
        f"Multiply-adds at {text_tokens} non-visual tokens, batch 1 (1 GMAC = 2 GFLOP); fvcore on the meta device.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * 3 + " ---: |" * (len(head) - 3),
    ]
    for row in rows:
        cells = [row["model"], row["method"], str(row["budget"]), f"{row['entering']:.1f}", f"{row['leaving']:.1f}",
                 f"{row['llm_prefill']:,.2f}", f"{2 * row['llm_prefill']:,.2f}", f"{row['saved_percent']:.1f} %",
                 f"{row['vision']:,.2f}", f"{row['projector']:,.3f}", f"{row['decode']:,.4f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table for the chosen models, methods and budgets."""
    parser = argparse.ArgumentParser(description="Count a pruned prefill's multiply-adds without weights.")
    parser.add_argument("--model", nargs="+", default=["llava-1.5-7b"], help=f"{', '.join(PUBLISHED)}, mini, a folder")
    parser.add_argument("--method", nargs="+", default=["none", "random", "sparsevlm"], help=", ".join(methods()))
    parser.add_argument("--budget", nargs="+", type=int, default=[192, 128, 64], help="mean visual tokens per layer")
    parser.add_argument("--text-tokens", type=int, default=118, help="all tokens that are not visual (default: 118)")
    args = parser.parse_args(argv)
    try:
        rows = table(args.model, args.method, args.budget, args.text_tokens)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(render(rows, args.text_tokens))


if __name__ == "__main__":
    main()
