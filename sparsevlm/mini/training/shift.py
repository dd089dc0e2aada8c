"""Solves the shift of ATP-LLaVA's thresholds that reaches a mean number of tokens on training pictures:

    python -m sparsevlm.mini.training.shift --leaving 150
    python -m sparsevlm.mini.training.shift --leaving 150 --modules untrained --seed 1

Prints the shift, and the mean tokens leaving a layer that it reaches there.
"""

import argparse
import sys

import torch

import sparsevlm
from sparsevlm.mini.scenes import GRID
from sparsevlm.mini.training.batches import ANSWER_WEIGHT, PREFIX, BatchShape, SceneBatches
from sparsevlm.mini.vocabulary import IMAGE, PAD, WORD_ID

_BATCH, _STEPS, _CLOSE = 8, 12, 0.5
_STREAM = 1  # of training pictures that the training of modules does not draw


def prompts(pictures: int) -> list[dict[str, torch.Tensor]]:
    """Draw batches of training pictures with one question each, as arguments of the model's forward."""
    data, out = SceneBatches("train", 0, _STREAM, BatchShape(GRID, _BATCH, 1)), []
    for index in range(-(-pictures // _BATCH)):
        batch = data[index]
        asked = (batch["weights"] == ANSWER_WEIGHT).float().argmax(1) + 1
        start = torch.tensor([*PREFIX, *[WORD_ID[IMAGE]] * (GRID * GRID)])
        rows = [torch.cat([start, ids[:n]]) for ids, n in zip(batch["ids"], asked, strict=True)]
        length = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=WORD_ID[PAD]) for row in rows])
        out.append({"input_ids": ids, "attention_mask": (ids != WORD_ID[PAD]).long(), "pixel_values": batch["pixels"]})
    return out


@torch.no_grad()
def mean_leaving(model, data: list[dict[str, torch.Tensor]], **options) -> float:
    """Measure the mean visual tokens leaving a layer."""
    with sparsevlm.build("atp_llava", **options)(model) as trace:
        for batch in data:
            model.model(**batch, use_cache=False)
    return sum(sum(r.leaving) for r in trace.prefills) / sum(len(r.leaving) for r in trace.prefills)


def solve(model, data: list[dict[str, torch.Tensor]], leaving: float, **options) -> tuple[float, float]:
    """Find the shift by bisection; more of it keeps fewer tokens.

    Returns:
        The shift with the nearest mean, to half a token where there is one, and that mean.
    """
    low, high, tried = -2.0, 20.0, []
    for _ in range(_STEPS):
        shift = (low + high) / 2
        tried.append((abs((reached := mean_leaving(model, data, shift=shift, **options)) - leaving), shift, reached))
        if tried[-1][0] < _CLOSE:
            break
        low, high = (shift, high) if reached > leaving else (low, shift)
    _, shift, reached = min(tried)
    return shift, reached


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsevlm.mini.training.shift", description="Solves the shift.")
    parser.add_argument("--leaving", type=float, required=True, help="mean visual tokens leaving a layer")
    parser.add_argument("--modules", help="file, untrained or fixed; default: the shipped ones")
    parser.add_argument("--seed", type=int, default=0, help="of untrained modules")
    parser.add_argument("--pictures", type=int, default=200)
    options = parser.parse_args(arguments)
    try:
        model, _ = sparsevlm.load("mini")
        chosen = {"modules": options.modules, "seed": options.seed}
        shift, reached = solve(model, prompts(options.pictures), options.leaving, **chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"shift={shift:.4f} leaves {reached:.1f} tokens per layer on {options.pictures} training pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
