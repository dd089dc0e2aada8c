"""Ablations: the same method and budget with another value of one option, on the same questions; and the paper's.

Built from whatever runs differ in nothing but that option. `experiment=ablation_recycling`, `ablation_raters`,
`ablation_text_tokens` and `ablation_layers` make such runs on the embedded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
import pandas as pd

from eval.runs.reader import Group, Run, label, plain
from scripts.published import look_up
from scripts.tables.benchmarks import GQA, POPE, TEXTVQA, limited, paper_runs, value
from scripts.tables.formats import FLAGGED, NOT_RUN, NOTHING, Part, Table, cell
from scripts.tables.summary import difference, embedded, kept_apart, metric_of, shown
from sparsevlm.methods import method_class

OPTIONS = {
    "recycle": ("recycling", "share of the dropped tokens that is recycled; 0: plain pruning at the same budget"),
    "raters": ("raters", "which text tokens rate the visual ones; a number: so many, the most relevant"),
    "layers": ("layers", "layers on whose output pruning acts"),
}
_SEVEN_B = "llava_1_5_7b"
_RATED_BY = {"all text tokens": "all", "all tokens": "tokens"}  # the paper's words, and our option
_COMMAND = ".venv/bin/python -m eval.run -m experiment=llava_1_5_7b_paper method=sparsevlm"


def ablation(group: Group, option: str, metric: str | None = None) -> pd.DataFrame:
    """Runs of a group that differ in one option only.

    Returns:
        one row per method, budget and value: `method`, `budget`, `setting` (the value; the default says so),
        `is_default`, `entering`, `leaving`, `value`, `low`, `high`, `difference` to the default with
        `difference_low`, `difference_high` (paired), `runs`. Empty if nothing was varied. Shares are in %.
    """
    metric, percent = metric_of(group, metric)
    group, scale, rows = group.scored(metric), 100.0 if percent else 1.0, []
    for base in group.runs:
        m = base.metrics
        if option not in m["options"] or m["options"][option] != _default(m["method"], option):
            continue
        others = [r for r in group.runs if r is not base and _differs_only_in(option, base, r)]
        for run in [base, *sorted(others, key=lambda r: plain(r.metrics["options"][option]))] if others else []:
            entry = run.metrics["metrics"][metric]
            low, high = entry["ci95"] or (np.nan, np.nan)
            spread = (0.0, 0.0, 0.0)
            if run is not base:
                spread = difference(run, base, metric)
            rows.append({
                "method": label(m["method"], m["options"]), "budget": m["budget"], "setting": _setting(run, option),
                "is_default": run is base, "entering": run.metrics["tokens"]["entering"],
                "leaving": run.metrics["tokens"]["leaving"], "value": scale * entry["value"], "low": scale * low,
                "high": scale * high, "difference": scale * spread[0], "difference_low": scale * spread[1],
                "difference_high": scale * spread[2],
                "runs": tuple(dict.fromkeys((run.folder.name, base.folder.name))),
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.sort_values(["method", "budget"], ascending=[True, False], kind="stable") if rows else frame


def _differs_only_in(option: str, base: Run, run: Run) -> bool:
    a, b = base.metrics, run.metrics
    if (a["method"], a["budget"]) != (b["method"], b["budget"]):
        return False
    keys = {*a["options"], *b["options"]}
    return {k for k in keys if a["options"].get(k) != b["options"].get(k)} == {option}


def _default(method: str, option: str):
    return next(f.default for f in fields(method_class(method)) if f.name == option)


def _setting(run: Run, option: str) -> str:
    found = run.metrics["options"][option]
    default = _default(run.metrics["method"], option)
    if found is None:
        return "default"
    return plain(found) + (" (default)" if found == default else "")


def ablation_table(group: Group, option: str, metric: str | None = None) -> Table | None:
    """The table of one option, or None if nobody varied it."""
    frame = ablation(group, option, metric)
    if frame.empty:
        return None
    what, meaning = OPTIONS[option]
    metric, percent = metric_of(group, metric)
    unit = " %" if percent else ""
    rows = []
    for row in frame.to_dict("records"):
        change = "0" if row["is_default"] else interval(row, "difference", "+")
        texts = [
            row["method"], str(row["budget"]), row["setting"], f"{row['entering']:.1f}", f"{row['leaving']:.1f}",
            interval(row), change,
        ]  # fmt: skip
        rows.append([cell(text, *row["runs"][: 2 if i == 6 else 1]) for i, text in enumerate(texts)])
    caption = (
        f"Ablation of {what} ({meaning}): {group.task} on the model {group.model}, {group.n} questions, seed "
        f"{group.seed}. {embedded(group.model)}{kept_apart(group, metric)}"
        f"{shown(metric)}{unit} with 95 % bootstrap interval; difference to the "
        "default of the same method and budget with paired bootstrap interval over the same questions."
    )
    columns = ["method", "budget", what, "entering", "leaving", f"{shown(metric)}{unit} [95 %]", "difference [95 %]"]
    return Table(f"{what}__{group.name}", f"Ablation of {what}: {group.task}, {group.model}", caption, columns, rows, 3)


def interval(row: dict, name: str = "value", sign: str = "") -> str:
    """A number with its interval, from the columns `name`, `name_low` (or `low`), `name_high` (or `high`)."""
    low, high = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    if pd.isna(row[low]):
        return f"{row[name]:{sign}.1f}"
    return f"{row[name]:{sign}.1f} [{row[low]:{sign}.1f}, {row[high]:{sign}.1f}]"


def recycling_paper(runs: Sequence[Run]) -> Table:
    """The paper's Table 4 (v4): recycling off and on, LLaVA-1.5-7B."""
    chosen, rows, missing = paper_runs(runs, _SEVEN_B), [], []
    for budget in (64, 96, 128, 192):
        for method in ("sparsevlm (recycle=0.0)", "sparsevlm"):
            row = [cell("off" if "(" in method else "on"), cell(str(budget))]
            for benchmark in (GQA, POPE):
                run = chosen.get((benchmark.task, method, budget))
                missing += [benchmark.task] if run is None else []
                (published,) = look_up(
                    "SparseVLM", "v4", "Table 4", method=method, tokens=budget, benchmark=benchmark.task
                ).to_dict("records")
                row.append((_ours(run, benchmark), published_part(published)))
            rows.append(row)
    caption = "Table 4 of the ICML paper (v4): token recycling off and on, LLaVA-1.5-7B. Each cell: ours | paper."
    if missing:
        tasks = ",".join(dict.fromkeys(missing))
        caption += (
            f" {NOT_RUN}: nobody ran it here; "
            f"`{_COMMAND} method.recycle=0.0,0.3 budget=64,96,128,192 task={tasks}` does."
        )
    columns = ["recycling", "tokens", GQA.label, POPE.label]
    return Table("recycling_paper", "Recycling ablation of the paper", caption, columns, rows)


def raters_paper(runs: Sequence[Run]) -> Table:
    """What the paper says of its raters (Figure 5 and section 5.1 of v4, v1's text): gains in points."""
    chosen = paper_runs(runs, _SEVEN_B)
    benchmarks = {"textvqa": TEXTVQA, "pope": POPE}
    kinds = {"gain_over_all_tokens": "all tokens", "gain_over_text_tokens": "all text tokens",
             "gain_by_raters": "not stated"}  # fmt: skip
    rows = []
    for version in ("v4", "v1"):
        found = look_up("SparseVLM", version, "Section 5.1")
        for row in found[found["metric"].isin(kinds)].to_dict("records"):
            against, benchmark = kinds[row["metric"]], benchmarks[row["benchmark"]]
            ours = Part(NOTHING, "ours")
            if against in _RATED_BY:
                methods = ("sparsevlm", f"sparsevlm (raters={_RATED_BY[against]})")
                pair = [chosen.get((benchmark.task, method, int(row["tokens"]))) for method in methods]
                ours = Part(NOT_RUN, "ours")
                if None not in pair:  # neither benchmark is judged
                    gain = value(pair[0], benchmark) - value(pair[1], benchmark)
                    ours = Part(f"{gain:+.1f}", "ours", tuple(r.folder.name for r in pair))
            names = [version, row["tokens"], against, benchmark.label]
            rows.append([*map(cell, names), (ours, published_part(row))])
    caption = (
        f"Gain by choosing raters, in points, LLaVA-1.5-7B. Each cell: ours | paper. {NOT_RUN}: nobody ran it here; "
        f"`{_COMMAND} method.raters=paper,all,tokens budget=64 task=textvqa,pope` does."
    )
    return Table("raters_paper", "Rater ablation of the paper", caption,
                 ["edition", "tokens", "against", "benchmark", "gain"], rows, 4)  # fmt: skip


def _ours(run: Run | None, benchmark) -> Part:
    if run is None:
        return Part(NOT_RUN, "ours")
    first = f" (n={run.metrics['n']})" if limited(run) else ""
    return Part(f"{value(run, benchmark):.{benchmark.digits}f}{first}", "ours", (run.folder.name,))


def published_part(row: dict | None) -> Part:
    """The paper's part of a cell, from a row of `eval/published.csv`."""
    if row is None:
        return Part(NOTHING, "paper")
    where = f"{row['paper']} {row['version']}, {row['table']}: {row['source']}"
    source = ". ".join(filter(None, [where, row["note"]]))
    return Part(row["value"] + (FLAGGED if row["flag"] else ""), "paper", source=source)


def ablation_tables(groups: Iterable[Group], runs: Sequence[Run], metric: str | None = None) -> list[Table]:
    """All of them: the paper's, and what was varied on each set of questions."""
    found = [ablation_table(group, option, metric) for group in groups for option in OPTIONS]
    return [recycling_paper(runs), raters_paper(runs), *[table for table in found if table is not None]]
