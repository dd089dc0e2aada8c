"""Count the multiply-adds of every method and budget on models without weights, and keep them as run folders.

    python -m eval.measure.flops --results results                                   # LLaVA-1.5-7B, 13B, Video-LLaVA
    python -m eval.measure.flops --models llava-1.5-7b --methods sparsevlm,fastv --text-tokens 60

Counted by fvcore on the meta device (`sparsevlm/cost/flops.py` says what): no weights, no GPU, a few seconds a count,
on all cores. Writes `<results>/runs/flops__<model>__<hash>/` per model; the same command again finds it and counts
nothing, and an interrupted one resumes. `scripts/make_tables.py` makes tables of it, with the paper's numbers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

from tqdm import tqdm

from eval.measure.once import Kept, Measured, measure_once, run_command
from eval.runs.reader import FLOPS
from sparsevlm.cost.flops import PARTS, first_token_gmacs, prefill_gmacs, row
from sparsevlm.methods import method_class
from sparsevlm.settings import Setting, parse_integers

BUDGETS = {"llava-1.5-7b": (192, 128, 64), "llava-1.5-13b": (192, 128, 64), "video-llava-7b": (194, 135)}
OTHER_BUDGETS = (192, 128, 64)  # of a model that is not in BUDGETS
UNCOUNTED = dict.fromkeys(("anchorprune", "cdpruner"), "needs CLIP's text tower, which is no part of the model")
UNCOUNTED |= {
    "atp_llava": "keeps as many tokens as the picture asks for; its runs say how many these were",
}
# Without weights: an untrained predictor computes as much as a trained one; the model itself as guide.
WEIGHTS = {"dynamic_llava": {"predictor": "untrained"}, "sgl": {"guide": "self"}}
# The rank forms at the ranks at which they meet their nominal budgets: settings of the README of the authors' v1.0,
# and their video branch's at the budgets of the paper's v4 (194) and v1 (135).
RANKS = {
    "llava": [
        {"rule": "v1.0", "scale": 13.5, "bias": 0, "rank": 12}, {"rule": "v1.0", "scale": 9, "bias": 6, "rank": 10},
        {"rule": "v1.0", "scale": 0.8, "bias": 0, "rank": 33},
    ],
    "video": [{"rule": "video", "layers": [2], "rank": 8}, {"rule": "video", "layers": [1], "rank": 11}],
}  # fmt: skip
PLAIN = {"early_drop": False}
PAPER = "llava-1.5-7b"
#: (budget, text tokens) at which the paper's abstract states savings: a range over prompt lengths.
PAPER_RANGE = ((128, 130), (128, 70))

Entry = tuple[str, str, "int | str | None", int, dict]  # arguments of `sparsevlm.cost.flops.row`


def main(argv: list[str] | None = None) -> None:
    """Count and write; one line on stderr and exit status 2 for what cannot be."""
    run_command("flops", __doc__, _add_arguments, _as_asked, argv)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text-tokens", type=int, default=118, help="all tokens that are not visual (default: 118, the paper's)")
    add("--models", nargs="+", default=list(BUDGETS), help=f"{', '.join(BUDGETS)}, mini, a folder, llama-1024x16")
    add("--methods", help="comma-separated (default: all); the unpruned model comes first")
    add("--budgets", help="comma-separated (default: 192,128,64; for videos 194,135)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes")


def _as_asked(args: argparse.Namespace, command: str) -> str:
    names = args.methods.split(",") if args.methods else [m for m in sparsevlm.methods() if m not in UNCOUNTED]
    budgets = parse_integers(args.budgets) if args.budgets else None
    work = {}
    for model in args.models:
        chosen = settings(model, names, budgets or BUDGETS.get(model, OTHER_BUDGETS))
        work[model] = [(model, name, budget, args.text_tokens, options) for name, budget, options in chosen]
        if model == PAPER and "sparsevlm" in names:
            work[model] += _paper_range(args.text_tokens)
        for _, name, budget, _, options in work[model]:  # what cannot be is refused before minutes are spent
            sparsevlm.build(name, budget=budget, **{k: v for k, v in options.items() if k != "rank"})
    made = [count_once(args.results, model, entries, command, args.jobs) for model, entries in work.items()]
    return "\n".join(made)


def settings(model: str, names: Iterable[str], budgets: Sequence[int]) -> Iterator[Setting]:
    """Yield what is counted of a model: each method at each budget, and in plain form where it drops rows early."""
    yield "none", "full", {}
    for name in names:
        if name == "none":
            continue
        if method_class(name).adaptive:
            yield from ((name, None, options) for options in RANKS["video" if "video" in model else "llava"])
            continue
        options = WEIGHTS.get(name, {})
        for budget in budgets:
            yield name, budget, options
            if drops_early(name):
                yield name, budget, options | PLAIN


def drops_early(name: str) -> bool:
    """Return whether a method computes fewer rows by default and has a plain form."""
    return any(f.name == "early_drop" and f.default is True for f in fields(method_class(name)))


def _paper_range(text_tokens: int) -> list[Entry]:
    return [
        (PAPER, *setting[:2], length, setting[2])
        for budget, length in PAPER_RANGE
        if length != text_tokens
        for setting in (("none", "full", {}), ("sparsevlm", budget, PLAIN), ("sparsevlm", budget, {}))
    ]


def count_once(results: Path, model: str, entries: Sequence[Entry], command: str, jobs: int) -> str:
    """Count the settings of a model unless that was done, and keep the rows as a run folder.

    Each row is that of `sparsevlm.cost.flops.row` without the model's name, and with both totals of the GMACs
    (`prefill_gmacs`, `first_token_gmacs`).

    Args:
        results: folder that holds runs/.
        model: as `sparsevlm.cost.flops` takes it.
        entries: arguments of `sparsevlm.cost.flops.row`, all of this model.
        command: how the count was started, for env.json.
        jobs: processes.

    Returns:
        Where the run folder is.

    Raises:
        ValueError, OSError: unknown names, budgets that a method cannot keep, a folder that cannot be used.
    """
    name = Path(model).name.replace("-", "_").replace(".", "_")
    config = {"model": {"name": name, "pretrained": model}, "settings": [list(entry[1:]) for entry in entries]}
    config |= {"parts": list(PARTS), "sparsevlm": sparsevlm.__version__}

    def measured(kept: Kept) -> Measured:
        missing = [entry for entry in entries if entry not in kept]
        bar = tqdm(total=len(entries), initial=len(entries) - len(missing), desc=model, unit="count", mininterval=1)
        with bar:
            for entry, found in _counted(missing, jobs):
                kept.add([(entry, found)])
                bar.update()
        rows = [kept[entry] for entry in entries]
        return Measured(rows, rows, len(rows))

    return measure_once(results, FLOPS, f"{FLOPS}__{name}", config, command, measured)


def _counted(entries: Sequence[Entry], jobs: int) -> Iterator[tuple[Entry, dict]]:
    if jobs == 1 or len(entries) < 2:
        yield from ((entry, count_row(*entry)) for entry in entries)
        return
    with ProcessPoolExecutor(min(jobs, len(entries)), get_context("spawn")) as pool:
        futures = {pool.submit(count_row, *entry): entry for entry in entries}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def count_row(*entry) -> dict:
    """Count one setting; arguments and result are those of `sparsevlm.cost.flops.row`, with totals added."""
    found = row(*entry)
    del found["model"]
    gmacs = found["gmacs"]
    totals = {"prefill_gmacs": prefill_gmacs(gmacs), "first_token_gmacs": first_token_gmacs(gmacs)}
    return json.loads(json.dumps(found | totals))


if __name__ == "__main__":
    main()
