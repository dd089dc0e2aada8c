"""One method against every other one on the same questions, at equal budgets: paired differences with intervals.

    python scripts/compare.py signpost --results results/reference/frontier
    python scripts/compare.py "sparsevlm (raters=prior)" --results results/reference/frontier

Prints Markdown and writes it to `<results>/compare__<method>__<runs>.md`. Of the embedded model's questions
those count that need the picture. Methods are named as in the tables, with the options that are not the defaults.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.errors import UserError, report
from eval.markdown import markdown_table
from eval.runs.reader import Run, accuracy_groups, label, read_runs
from eval.runs.stats import bootstrap_ci, paired_difference
from eval.tasks.minivqa.utils import VISUAL


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", help="as the tables name it")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    options = parser.parse_args(arguments)
    try:
        made = [(g.name, compare(g.runs, options.method)) for g in accuracy_groups(read_runs(options.results))]
        found = [(name, text) for name, text in made if text]
        if not found:
            raise UserError(f"no runs of {options.method!r} with a budget in {options.results}/runs")
    except (UserError, ValueError) as error:
        return report(error if isinstance(error, UserError) else UserError(str(error)))
    for name, text in found:
        print(text)
        path = options.results / f"compare__{re.sub('[^a-z0-9]+', '_', options.method).strip('_')}__{name}.md"
        path.write_text(text, encoding="utf-8")
    return 0


def compare(runs: Sequence[Run], method: str) -> str:
    """Return the table of one method minus all others; empty if it has no run with a number as budget."""
    metric = VISUAL if VISUAL in runs[0].metrics["metrics"] else next(iter(runs[0].metrics["metrics"]))
    by_setting: dict[str, dict[int, Run]] = {}
    for run in runs:
        if isinstance(run.metrics["budget"], int):
            by_setting.setdefault(label(run.metrics["method"], run.metrics["options"]), {})[run.metrics["budget"]] = run
    ours = by_setting.pop(method, {})
    budgets = sorted(ours, reverse=True)
    if not budgets:
        return ""
    rows = [[f"**{method}**", *(_percent(ours[b], metric) for b in budgets)]]
    for other, theirs in sorted(by_setting.items()):
        rows.append([other, *(_difference(ours[b], theirs.get(b), metric) for b in budgets)])
    first = ours[budgets[0]]
    return (
        f"{method} minus each other method, `{metric}` in points, on the same {len(first.scores(metric))} questions "
        f"of `{first.task}` to `{first.model}` (seed {first.metrics['seed']}), in brackets 95 % paired bootstrap "
        "intervals; first row: its own accuracy in %. *: the interval does not contain 0. No correction for many "
        "comparisons.\n\n" + markdown_table(["", *map(str, budgets)], rows) + "\n"
    )


def _percent(run: Run, metric: str) -> str:
    mean, low, high = bootstrap_ci(list(run.scores(metric).values()))
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(run: Run, other: Run | None, metric: str) -> str:
    if other is None:
        return "not run"
    mean, low, high = (100 * x for x in paired_difference(run.scores(metric), other.scores(metric)))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{'*' if low > 0 or high < 0 else ''}"


if __name__ == "__main__":
    sys.exit(main())
