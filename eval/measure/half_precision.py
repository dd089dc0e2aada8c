"""Measure how many kept tokens half precision shares with float32, stage by stage.

    python -m eval.measure.half_precision --results results

On questions of `minivqa` with the model `mini`, and on a LLaVA-shaped language model with random weights (Llama, 576
visual and 60 other tokens; embeddings of unit variance). Each model decides in float32, bfloat16 and float16; reported
is the share of the tokens that float32 keeps (as indices into the original visual tokens, recycled ones left out) which
half precision keeps, too: mean and smallest over prompts. Writes `<results>/runs/half_precision__<hash>/`, of which
`scripts/make_tables.py` makes a table; the same command again finds it and measures nothing.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from eval.measure.once import Kept, Measured, measure_once, run_command
from eval.runs.reader import HALF_PRECISION
from eval.tasks.minivqa.dataset import rows as questions
from sparsevlm.methods.base import Method

DTYPES = ("bfloat16", "float16")
SETTINGS = [("sparsevlm", 192), ("sparsevlm", 64), ("sparsevlm_plus", 192), ("sparsevlm_plus", 64)]
SHAPES = {  # hidden size, layers, heads
    "random LLaVA, hidden 512, 8 layers": (512, 8, 8),
}
Prefill = Callable[[torch.nn.Module, Method], list]


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--prompts", type=int, default=12, help="questions of minivqa; random prompts are a third")

    def as_asked(args: argparse.Namespace, command: str) -> str:
        return measure_half_precision(args.results, args.prompts, command)

    run_command("half_precision", __doc__, add_arguments, as_asked, argv)


def measure_half_precision(results: Path, prompts: int, command: str) -> str:
    """Measure on that many questions unless that was done, and return where the run folder is.

    Raises:
        UserError, OSError: the folder cannot be written.
    """
    config = {"settings": [list(s) for s in SETTINGS], "shapes": SHAPES, "prompts": prompts}

    def measured(_: Kept) -> Measured:
        rows = measure(prompts)
        return Measured(rows, rows, len(rows))

    return measure_once(results, HALF_PRECISION, HALF_PRECISION, config, command, measured)


def measure(prompts: int) -> list[dict]:
    """One row per model, method, budget, dtype and stage: layer, mean and smallest overlap over the prompts."""
    found = []
    for name, model, prefills in _models(prompts):
        for dtype in DTYPES:
            kept = {}
            for run_in in ("float32", dtype):
                model = model.to(getattr(torch, run_in))
                for setting in SETTINGS:
                    kept[run_in, setting] = [_kept(model, setting, prefill) for prefill in prefills]
            for setting in SETTINGS:
                pairs = list(zip(kept["float32", setting], kept[dtype, setting], strict=True))
                for i, layer in enumerate(layer for layer, _ in pairs[0][0]):
                    shares = [_overlap(a[i][1], b[i][1]) for a, b in pairs]
                    method, budget = setting
                    found.append(
                        {"model": name, "method": method, "budget": budget, "dtype": dtype, "layer": layer}
                        | {"prompts": len(shares), "mean": sum(shares) / len(shares), "smallest": min(shares)}
                    )
    return found


def _overlap(one: set[int], other: set[int]) -> float:
    """Share of the first's tokens that the other has; of none (a stage may keep pooled tokens only), all or none."""
    return len(one & other) / len(one) if one else float(not other)


def _kept(model: torch.nn.Module, setting: tuple[str, int], prefill: Callable) -> list[tuple[int, set[int]]]:
    """(layer, original tokens kept) of each stage."""
    method, budget = setting
    with torch.no_grad():
        record = prefill(model, sparsevlm.build(method, budget=budget))
    return [(s.layer, set(s.origin[0].tolist()) - {-1}) for s in record.stages]


def _models(prompts: int) -> Iterator[tuple[str, torch.nn.Module, list[Callable]]]:
    model, processor = sparsevlm.load("mini", dtype="float32")
    samples = questions(seed=0, n=prompts)
    inputs = [processor(text=s["question"], images=Image.open(io.BytesIO(s["image"]["bytes"]))) for s in samples]
    yield "mini", model, [_of_inputs(x) for x in inputs]
    for name, (hidden, layers, heads) in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
            num_attention_heads=heads, vocab_size=128,
        )  # fmt: skip
        yield (
            name,
            LlamaForCausalLM(config).eval(),
            [_of_embeddings(seed, hidden) for seed in range(max(1, prompts // 3))],
        )


def _of_inputs(inputs) -> Callable:
    def prefill(model, method):
        with method(model) as trace:
            model(**inputs.to(model.dtype), use_cache=True, logits_to_keep=1)
        return trace.prefills[0]

    return prefill


def _of_embeddings(seed: int, hidden: int) -> Callable:
    embeddings = torch.randn(1, 636, hidden, generator=torch.Generator().manual_seed(seed))
    visual = torch.zeros(1, 636, dtype=torch.bool)
    visual[:, 35:611] = True

    def prefill(model, method):
        with method(model, visual_mask=visual) as trace:
            model(inputs_embeds=embeddings.to(model.dtype), use_cache=True, logits_to_keep=1)
        return trace.prefills[0]

    return prefill


if __name__ == "__main__":
    main()
