"""Multiply-adds of LLaVA-1.5-7B, 13B and Video-LLaVA-7B for every method and budget, beside the paper's.

    python scripts/tables/flops.py --results results
    python scripts/tables/flops.py --results results --text-tokens 60 --models llava-1.5-7b --methods sparsevlm,fastv

Counted by fvcore on the meta device (`sparsevlm/cost/flops.py` says what): no weights, no GPU, a few seconds a count,
on all cores. Writes `flops__t<text tokens>.json`, `.md` and `.csv` to `<results>/tables/` (elsewhere with --out). Files
that are there are never overwritten: equal ones are left, others end the script. An interrupted script goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

if not __package__:  # started as a file: this folder must go anyway, a `profile` in it hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import pandas as pd
from tqdm import tqdm

from eval.runs import environment
from scripts.published import look_up
from scripts.tables.flops_text import text
from sparsevlm.cost.flops import first_token_gmacs, prefill_gmacs, row, with_savings
from sparsevlm.cost.machine import code_version
from sparsevlm.methods import method_class
from sparsevlm.settings import Setting

BUDGETS = {"llava-1.5-7b": (192, 128, 64), "llava-1.5-13b": (192, 128, 64), "video-llava-7b": (194, 135)}
UNCOUNTED = dict.fromkeys(("anchorprune", "cdpruner"), "needs CLIP's text tower, which is no part of the model")
# The rank forms at the ranks at which they meet their nominal budgets: settings of the README of the authors' v1.0,
# and their video branch's at the budgets of the paper's v4 (194) and v1 (135).
RANKS = {
    "llava": [
        {"rule": "v1.0", "scale": 13.5, "bias": 0, "rank": 12}, {"rule": "v1.0", "scale": 9, "bias": 6, "rank": 10},
        {"rule": "v1.0", "scale": 0.8, "bias": 0, "rank": 33},
    ],
    "video": [{"rule": "video", "layers": [2], "rank": 8}, {"rule": "video", "layers": [1], "rank": 11}],
}  # fmt: skip
PAPER, PAPER_TEXT_TOKENS = "llava-1.5-7b", 118
PLAIN = {"early_drop": False}
CLAIMS = (  # of the paper's text: version, where, metric, budget, text tokens, what it is
    (
        "v1",
        "Abstract",
        "flops_reduction_smallest",
        128,
        130,
        "budget 128; a range over prompt lengths: 130 text tokens",
    ),
    ("v1", "Abstract", "flops_reduction_largest", 128, 70, "the same at 70 text tokens"),
    ("v4", "Abstract", "flops_reduction", 192, 118, "budget 192 of table 1; the 97 % beside it are of budget 128"),
    ("v4", "Section 5.3", "flops_reduction", 128, 118, "budget 128 of table 1"),
    ("v1", "Section 5.3", "flops_reduction", 64, 118, "of VoCo-LLaMA's 9.6 T, not of the 4.62 T of table 1"),
)


def main(argv: list[str] | None = None) -> None:
    """Count and write; one line on stderr and exit status 2 for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="tables go to <results>/tables")
    parser.add_argument("--out", type=Path, help="another folder for them")
    parser.add_argument("--text-tokens", type=int, default=118, help="all tokens that are not visual (default: 118)")
    parser.add_argument("--models", nargs="+", default=list(BUDGETS), help=f"{', '.join(BUDGETS)}, mini, a folder")
    parser.add_argument("--methods", help="comma-separated (default: all)")
    parser.add_argument("--budgets", help="comma-separated (default: 192,128,64; for videos 194,135)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    try:
        names = args.methods.split(",") if args.methods else [m for m in sparsevlm.methods() if m not in UNCOUNTED]
        budgets = [int(b) for b in args.budgets.split(",")] if args.budgets else None
        chosen = {m: list(settings(m, names, budgets or BUDGETS.get(m, (192, 128, 64)))) for m in args.models}
        for path in write(chosen, args.text_tokens, args.out or args.results / "tables", args.jobs):
            print(path)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: the same command goes on from there\n")
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"flops_table: {error}\n")


def settings(model: str, names: Iterable[str], budgets: Iterable[int]) -> Iterator[Setting]:
    """What is counted of a model: each method at each budget, and in plain form where early drop can be turned off."""
    yield "none", "full", {}
    for name in names:
        if name == "none":
            continue
        if method_class(name).adaptive:
            yield from ((name, None, options) for options in RANKS["video" if "video" in model else "llava"])
            continue
        for budget in budgets:
            yield name, budget, {}
            if _drops_early(name):
                yield name, budget, PLAIN


def _drops_early(name: str) -> bool:
    """Whether a method computes fewer rows by default, and can be told not to."""
    return any(f.name == "early_drop" and f.default is True for f in fields(method_class(name)))


def write(chosen: dict[str, list[Setting]], text_tokens: int, folder: Path, jobs: int) -> list[Path]:
    """Count and write the three files, unless equal ones are there; returns their paths.

    Raises:
        ValueError: other counts are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"flops__t{text_tokens}"
    partial = folder / f".{stem}.partial"
    counts = Counts(partial, jobs)
    work = [(model, name, budget, text_tokens, options) for model, ss in chosen.items() for name, budget, options in ss]
    with_paper = PAPER in chosen
    counts.make(work + (paper_work() + claim_work() if with_paper else []))
    result = {"schema": 1, "text_tokens": text_tokens, "rows": with_savings([counts[entry] for entry in work])}
    if with_paper:
        result |= {"paper": paper_rows(counts), "claims": claim_rows(counts)}
    about = {"versions": environment.versions(), "git": environment.git()}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    csv = pd.DataFrame([_flat(line) for line in result["rows"]]).to_csv(index=False)
    texts = {".csv": csv, ".md": text(result, UNCOUNTED), ".json": json.dumps({**result, **about}, indent=1) + "\n"}
    paths = {suffix: folder / f"{stem}{suffix}" for suffix in texts}
    if paths[".json"].exists():
        there = json.loads(paths[".json"].read_text(encoding="utf-8"))
        if json.loads(json.dumps(result)) != {key: there.get(key) for key in result}:
            raise ValueError(
                f"{paths['.json']} holds other counts (of {there.get('date')}): move it away or give --out"
            )
    else:
        for suffix, content in texts.items():
            made = folder / f".{stem}{suffix}.new"
            made.write_text(content, encoding="utf-8")
            os.replace(made, paths[suffix])
    partial.unlink(missing_ok=True)
    return list(paths.values())


class Counts:
    """Rows of `flops.row` by their arguments, counted in several processes.

    They are kept in a file as they come, for a script that is interrupted; those of other code do not count.
    """

    def __init__(self, partial: Path, jobs: int):
        self.partial, self.jobs, self.code = partial, jobs, code_version()
        self._rows: dict[str, dict] = {}
        if partial.is_file() and self.code is not None and "+" not in self.code:
            for line in partial.read_text(encoding="utf-8").splitlines(keepends=True):
                entry = json.loads(line) if line.endswith("\n") else {}
                if entry.get("code") == self.code:
                    self._rows[entry["key"]] = entry["row"]

    def __getitem__(self, entry: tuple) -> dict:
        return self._rows[json.dumps(entry)]

    def make(self, work: list[tuple]) -> None:
        """Count what is not there yet."""
        wanted = {json.dumps(entry): entry for entry in work}
        missing = {key: entry for key, entry in wanted.items() if key not in self._rows}
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="count", mininterval=1)
        with open(self.partial, "a", encoding="utf-8") as file, bar:
            for key, found in _counted(missing, self.jobs):
                self._rows[key] = found
                file.write(json.dumps({"code": self.code, "key": key, "row": found}) + "\n")
                file.flush()
                bar.update()


def _counted(work: dict[str, tuple], jobs: int) -> Iterator[tuple[str, dict]]:
    if jobs == 1 or len(work) < 2:
        yield from ((key, row(*entry)) for key, entry in work.items())
        return
    with ProcessPoolExecutor(min(jobs, len(work)), get_context("spawn")) as pool:
        futures = {pool.submit(row, *entry): key for key, entry in work.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _table_1() -> list[tuple]:
    """Printed rows of the paper's table 1 with method and budget."""
    printed = look_up("SparseVLM", "v4", "Table 1", model="llava_1_5_7b", benchmark="efficiency", metric="flops")
    return [(p, p.method, "full" if p.method == "none" else int(p.tokens)) for p in printed.itertuples()]


def paper_work() -> list[tuple]:
    """What `paper_rows` needs counted."""
    found = [(PAPER, name, budget, PAPER_TEXT_TOKENS, {}) for _, name, budget in _table_1()]
    return found + [(*entry[:4], PLAIN) for entry in found if _drops_early(entry[1])]


def paper_rows(counts: Counts) -> list[dict]:
    """Table 1 of the paper beside our counts, in 10^12 multiply-adds (the paper's "TFLOPs")."""
    rows = []
    for printed, name, budget in _table_1():
        setting = PAPER, name, budget, PAPER_TEXT_TOKENS
        found, plain = counts[(*setting, {})], counts[(*setting, PLAIN if _drops_early(name) else {})]
        rows.append({
            "method": name,
            "budget": budget,
            "paper": printed.number,
            "formula": plain["formula_gmacs"] / 1e3,
            "counted_plain": prefill_gmacs(plain["gmacs"]) / 1e3,
            "counted": prefill_gmacs(found["gmacs"]) / 1e3,
            "source": printed.source,
        })  # fmt: skip
    return rows


def _claim_settings(budget: int, text_tokens: int) -> list[tuple]:
    """Unpruned, plain and default form."""
    chosen = [("none", "full", {}), ("sparsevlm", budget, PLAIN), ("sparsevlm", budget, {})]
    return [(PAPER, name, b, text_tokens, options) for name, b, options in chosen]


def claim_work() -> list[tuple]:
    """What `claim_rows` needs counted."""
    return [entry for claim in CLAIMS for entry in _claim_settings(claim[3], claim[4])]


def claim_rows(counts: Counts) -> list[dict]:
    """Savings that the paper states, beside ours of the setting each belongs to, in %."""
    rows = []
    for version, table, metric, budget, text_tokens, meaning in CLAIMS:
        (printed,) = look_up("SparseVLM", version, table, metric=metric, tokens=budget).itertuples()
        full, plain, found = (counts[entry] for entry in _claim_settings(budget, text_tokens))
        most = prefill_gmacs(full["gmacs"])
        rows.append({
            "claim": printed.number,
            "where": f"{version}, {table}",
            "meaning": meaning,
            "budget": budget,
            "text_tokens": text_tokens,
            "formula": 100 * (1 - plain["formula_gmacs"] / full["formula_gmacs"]),
            "counted_plain": 100 * (1 - prefill_gmacs(plain["gmacs"]) / most),
            "counted": 100 * (1 - prefill_gmacs(found["gmacs"]) / most),
            "source": printed.source,
        })  # fmt: skip
    return rows


def _flat(line: dict) -> dict:
    gmacs = {f"{part}_gmacs": value for part, value in line["gmacs"].items()}
    rest = {k: v for k, v in line.items() if k not in ("gmacs", "options")}
    totals = {"prefill_gmacs": prefill_gmacs(line["gmacs"]), "first_token_gmacs": first_token_gmacs(line["gmacs"])}
    totals["prefill_gflops"] = 2 * totals["prefill_gmacs"]
    return {**rest, "options": json.dumps(line["options"]), **gmacs, **totals}


if __name__ == "__main__":
    main()
