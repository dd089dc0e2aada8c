"""`python -m tests.fuzz`: run any number of random cases; see `--help`.

Cases come in chunks of 100, each with a seed of its own, so that a run can be interrupted and taken up again. The first
case that fails is made as small as hypothesis can make it and printed as a script; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.case import Case
from tests.fuzz.compare import check
from tests.fuzz.strategies import cases

CHUNK = 100


def snippet(case: Case) -> str:
    """A script that runs one case."""
    return (
        "from tests.fuzz.case import Case, Shape\nfrom tests.fuzz.compare import check\n\n"
        f"print(check({case!r}))"
    )  # fmt: skip


def run_chunk(
    number: int, size: int, tally: Counter, shrink: bool = True, windows: bool = False
) -> tuple[Case, BaseException] | None:
    """Check `size` random cases; returns the smallest case found that fails, and how."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    last: list[Case] = []
    failed: list[bool] = []

    @seed(number)
    @settings(
        max_examples=size, deadline=None, database=None, phases=phases, print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(cases(windows))
    def one(case: Case) -> None:
        last[:] = [case]
        try:
            result = check(case)
        except BaseException:
            failed[:] = [True]
            raise
        if not failed:
            tally[result.split(":")[0]] += 1
            if not result.startswith("exact"):
                tally[result[:60]] += 1
            tally[f"method {case.method}"] += 1
            tally[f"mode {case.mode}"] += 1

    try:
        one()
    except Exception as error:
        return last[0], error
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first chunk; each further one takes the next")
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz"), help="folder of what was found")
    parser.add_argument("--resume", action="store_true", help="go on where the last run in that folder stopped")
    parser.add_argument("--keep-going", action="store_true", help="note failures and go on")
    parser.add_argument("--windows", action="store_true", help="sliding windows, too")
    o = parser.parse_args(arguments)
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / f"seed{o.seed}.json"
    state = {"seed": o.seed, "done": 0, "tally": {}, "failures": []}
    if o.resume and path.exists():
        state = json.loads(path.read_text())
    tally, start, first = Counter(state["tally"]), time.monotonic(), state["done"]
    while state["done"] < o.cases:
        chunk, size = state["done"] // CHUNK, min(CHUNK, o.cases - state["done"])
        found = run_chunk(o.seed * 1_000_003 + chunk, size, tally, windows=o.windows)
        state["done"] += size
        if found is not None:
            case, error = found
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            state["failures"].append({"chunk": chunk, "error": text, "case": repr(case)})
            print(f"\nFAILED: {text}\n\n{snippet(case)}\n", file=sys.stderr)
        state["tally"] = dict(tally)
        path.write_text(json.dumps(state, indent=1) + "\n")
        rate = (state["done"] - first) / (time.monotonic() - start)
        summary = ", ".join(f"{tally[k]} {k}" for k in ("exact", "refused", "undecided"))
        print(f"{state['done']}/{o.cases} cases ({rate:.1f}/s): {summary}, {len(state['failures'])} failed", flush=True)
        if found is not None and not o.keep_going:
            break
    return 1 if state["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
