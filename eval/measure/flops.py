"""Count the multiply-adds of a published model at the paper's settings and keep them as a run folder.

    python -m eval.measure.flops --results results      # minutes; needs no weights

Writes `<results>/runs/flops__<model>__<hash>/`; the same command again finds it and counts nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

from tqdm import tqdm

from eval.errors import UserError
from eval.measure.once import Measured, command_of, measure_once, print_result, said
from eval.runs.reader import FLOPS
from sparsevlm.cost.flops import PARTS, prefill_gmacs
from sparsevlm.cost.flops import run as count

METHODS = "tome,fastv,pyramiddrop,sparsevlm,visionzip,divprune"
BUDGETS = "192,128,64"


def main(argv: list[str] | None = None) -> None:
    """Count and write; one line on stderr and exit status 2 for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--model", default="llava-1.5-7b", help="as sparsevlm.cost.flops takes it")
    parser.add_argument("--methods", default=METHODS, help="separated by commas; the unpruned model comes first")
    parser.add_argument("--budgets", default=BUDGETS, help="separated by commas")
    parser.add_argument("--text-tokens", type=int, default=118, help="non-visual tokens (118: the paper's column)")
    args = parser.parse_args(argv)
    command = command_of("flops", argv)
    print_result("flops", lambda: _as_asked(args, command))


def _as_asked(args: argparse.Namespace, command: str) -> str:
    try:
        budgets = [int(b) for b in args.budgets.split(",")]
    except ValueError as error:
        raise UserError(f"budgets {args.budgets!r} must be integers separated by commas") from error
    settings = [("none", "full"), *((m, b) for m in args.methods.split(",") for b in budgets)]
    return count_settings(args.results, args.model, settings, args.text_tokens, command)


def count_settings(
    results: Path, model: str, settings: Sequence[tuple[str, int | str]], text_tokens: int, command: str
) -> str:
    """Count unless that was done, keep the rows as a run folder and return where it is.

    Args:
        results: folder that holds runs/.
        model: as `sparsevlm.cost.flops` takes it.
        settings: (method, budget) each.
        text_tokens: all tokens of the prompt that are not visual.
        command: how the count was started, for env.json.

    Raises:
        UserError, ValueError, OSError: unknown names, budgets that a method cannot keep, a folder that cannot be used.
    """
    name = model.replace("-", "_").replace(".", "_")
    for method, budget in settings:
        sparsevlm.build(method, budget=budget)  # what cannot be is refused before minutes are spent
    config = {"model": {"name": name, "pretrained": model}, "text_tokens": text_tokens}
    config |= {"settings": [list(setting) for setting in settings], "sparsevlm": sparsevlm.__version__}
    config["parts"] = list(PARTS)  # how the work is booked

    def measured() -> Measured:
        rows = [count_row(model, *setting, text_tokens) for setting in tqdm(settings, desc="settings", disable=None)]
        return Measured(rows, rows, len(rows))

    return said(*measure_once(results, FLOPS, f"{FLOPS}__{name}", config, command, measured))


def count_row(model: str, method: str, budget: int | str, text_tokens: int) -> dict:
    """Count one setting: method, budget, options, text_tokens, entering, leaving, gmacs by part, prefill_gmacs."""
    found = count(model, method, budget, text_tokens)
    options = {k: v for k, v in asdict(sparsevlm.build(method, budget=budget)).items() if k != "budget"}
    return {
        "method": method,
        "budget": budget,
        "options": options,
        "text_tokens": text_tokens,
        "entering": found.entering,
        "leaving": found.leaving,
        "gmacs": found.gmacs,
        "prefill_gmacs": prefill_gmacs(found.gmacs),
    }


if __name__ == "__main__":
    main()
