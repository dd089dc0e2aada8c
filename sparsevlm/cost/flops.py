"""Multiply-adds of a pruned model, counted by fvcore on the meta device: no weights, no GPU, seconds.

What is counted: the matrix products (linear layers, QK^T and PV of attention, patch embedding, and the pruning method's
own: similarities, rater choice, rater rows, clustering, merging) of one unmodified forward pass with the method's hooks
in place. One rule for all methods says where it is booked:

- `vision`, `projector`, `llm_prefill` are the model's own layers as they run, on as many tokens as the method leaves
  them (a method that shortens the tower makes `vision` smaller; the layer calls of one token in whose place such a
  method computes a layer run, and are in it);
- `method` is what the method computes itself, wherever that is: in the tower, at the projector, in the language model.
  Queries and keys that scoring computes in place of a layer are the layer's; those that are computed twice are the
  method's once;
- `guide` is a second model that runs first (`sgl`): its layers on the prompt, its decode steps (as many as it may
  generate, less one: where its answer ends is not known beforehand), and its own tower and projector, unless it shares
  those of the model. 0 for all other methods.

Two totals, in both of which `method` and `guide` are: *prefill* = llm_prefill + method + guide (`prefill_gmacs`), what
comparisons use, so that a method is charged with its work wherever it does it; and *first token* = vision + projector +
prefill (`first_token_gmacs`), everything from the pixels to the first token. Methods inside the language model: the
prefill is what the paper's formula is compared with (on LLaVA-1.5-7B 2.135, 1.732 and 1.315 TMAC, with early drop
2.077, 1.665 and 1.245, of 4.621). `decode` is one token after the prompt.

What is not counted: element-wise work, norms, softmax, rotary embedding, sorting, the singular values behind a rank. No
credit is taken for causality: attention over n tokens counts n x n, in the scores and in their product with the values,
as the paper's formula does.

Units: GMACs. fvcore, and the "TFLOPs" of the SparseVLM paper, count one multiply-add as one; 1 MAC = 2 FLOPs.
Every layer that a real forward runs is counted, also CLIP's last one, whose output LLaVA-1.5 never reads (8 GMAC for an
image of 336 pixels; a tracer that removes dead code misses it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsevlm.cost.counters import (
    METHOD,
    PROJECTOR,
    Decode,
    Prefill,
    countable,
    fvcore_gmacs,
    meta_model,
    tower_names,
)
from sparsevlm.cost.shapes import load_config, make_prompt
from sparsevlm.methods import build
from sparsevlm.methods.base import Method
from sparsevlm.methods.sparsevlm import SparseVLM
from sparsevlm.methods.sparsevlm_rank import SparseVLMRank
from sparsevlm.runtime.parts import GUIDE

PARTS = ("llm_prefill", "vision", "projector", "method", "guide", "decode")


@dataclass(frozen=True)
class Count:
    """The cost of one setting.

    Attributes:
        gmacs: by part, see `count`.
        lengths: all tokens, visual and text, that enter each decoder layer.
        entering, leaving: mean visual tokens per layer.
    """

    gmacs: dict[str, float]
    lengths: list[int]
    entering: float
    leaving: float


def count(
    model: str = "llava-1.5-7b",
    method: str = "none",
    budget: int | str | None = "full",
    text_tokens: int = 118,
    rank: int | None = None,
    **method_options,
) -> dict[str, float]:
    """Count the multiply-adds of one image (or one video of 8 frames) and its prompt, at batch 1.

    Args:
        model: "llava-1.5-7b", "llava-1.5-13b", "video-llava-7b", "mini", a folder that holds a config.json, or a text
            model such as "llama-1024x16".
        method: one of `sparsevlm.methods()`.
        budget: mean visual tokens per layer, or "full"; None where the method's own options say how many stay.
        text_tokens: all tokens that are not visual. 118 reproduces the paper's column (4.62 TMAC unpruned).
        rank: of the attention at every pruning layer, for `sparsevlm_rank`, whose token counts follow from it.
        **method_options: passed on to the method.

    Returns:
        GMACs (1 MAC = 2 FLOPs) of `vision` (tower), `projector`, `llm_prefill` (decoder layers, and the head on the
        last token), `method` (the pruning method's own work, wherever it does it), `guide` (a second model of the
        method's) and `decode` (one token after the prompt, head included). The first five share no work;
        `prefill_gmacs` and `first_token_gmacs` add them up.

    Raises:
        ValueError: unknown model, method or option; a method whose kept counts depend on the picture, without a rank.
        ImportError: fvcore is not installed.
    """
    return run(model, method, budget, text_tokens, rank, **method_options).gmacs


def run(
    model: str, method: str, budget: int | str | None, text_tokens: int, rank: int | None = None, **method_options
) -> Count:
    """As `count`, with the lengths that were counted."""
    pruner = _known_counts(build(method, budget=budget, **method_options), rank)
    config = load_config(model)
    net = meta_model(model)
    prompt = make_prompt(config, text_tokens, device="meta", dtype=net.dtype)
    step = torch.empty(1, 1, dtype=torch.long, device="meta")
    prefill = Prefill(net, tuple(prompt.inputs))
    with countable(net), pruner(net, visual_mask=prompt.visual_mask) as trace:
        by_module = fvcore_gmacs(prefill, tuple(prompt.inputs.values()))
        per_token = fvcore_gmacs(Decode(net, prefill.cache), (step,))[""]
    parts = {**split(by_module, net), "decode": per_token}
    if trace.prefills:
        record = trace.prefills[0]
        return Count(parts, lengths_entering(record), record.entering[0], record.leaving[0])
    n = prompt.visual_tokens
    layers = getattr(config, "text_config", config).num_hidden_layers
    return Count(parts, [n + text_tokens] * layers, float(n), float(n))


def split(by_module: dict[str, float], net: torch.nn.Module) -> dict[str, float]:
    """`llm_prefill`, `vision`, `projector`, `method` and `guide` of counts per submodule of a `Prefill`."""
    towers = sum(by_module[f"net.model.{name}"] for name in tower_names(net))
    projector = by_module.get(f"net.model.{PROJECTOR}", 0.0)
    added = {"method": by_module[METHOD], "guide": by_module[GUIDE]}
    llm = by_module[""] - towers - projector - sum(added.values())
    return {"llm_prefill": llm, "vision": towers, "projector": projector, **added}


def prefill_gmacs(gmacs: dict[str, float]) -> float:
    """GMACs of the language model, the method's own work and its guide, from `count`: what prefills compare by."""
    return gmacs["llm_prefill"] + gmacs["method"] + gmacs.get("guide", 0.0)  # counts from before there were guides


def first_token_gmacs(gmacs: dict[str, float]) -> float:
    """GMACs of everything from the pixels to the first token, from `count`."""
    return gmacs["vision"] + gmacs["projector"] + prefill_gmacs(gmacs)


def _known_counts(pruner: Method, rank: int | None) -> Method:
    """The method, with its token counts known beforehand."""
    if rank is None and not pruner.adaptive:
        return pruner
    if rank is None:
        raise ValueError(
            f"method {pruner.name!r} keeps as many tokens as the picture asks for: without running it they are "
            "unknown. Give the rank= of the attention, or count a fixed schedule (layers=..., keep=...)"
        )
    if not isinstance(pruner, SparseVLMRank):
        raise ValueError(f"rank={rank} is for sparsevlm_rank; the token counts of {pruner.name!r} do not follow a rank")
    if rank < 1:
        raise ValueError(f"rank={rank}: give 1 or more")

    class KnownRank(SparseVLMRank):
        def score(self, stage) -> Tensor:
            stage.prefill.scratch["ranks"] = [rank] * len(stage.n_visual)
            return SparseVLM.score(self, stage)

    return KnownRank(**{f.name: getattr(pruner, f.name) for f in fields(pruner) if f.init})


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


def row(
    model: str, method: str, budget: int | str | None, text_tokens: int, options: dict | None = None
) -> dict[str, object]:
    """One setting as a row of a table; the arguments are those of `count`, `rank` among the options.

    Returns:
        `model`, `method`, `budget`, `options`, `text_tokens`, `entering`, `leaving` (mean visual tokens per layer),
        `gmacs` (see `count`) and `formula_gmacs` (the paper's formula on the lengths that enter the layers).
    """
    counted = run(model, method, budget, text_tokens, **(options or {}))
    text = getattr(load_config(model), "text_config", load_config(model))
    return {
        "model": model,
        "method": method,
        "budget": budget,
        "options": options or {},
        "text_tokens": text_tokens,
        "entering": counted.entering,
        "leaving": counted.leaving,
        "gmacs": counted.gmacs,
        "formula_gmacs": formula_gmacs(counted.lengths, text.hidden_size, text.intermediate_size),
    }
