"""Efficiency: what is computed, what it takes, and what it costs in accuracy; and single latency runs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from eval.runs.reader import FLOPS, LATENCY, BadRun, Run, label
from scripts.published import look_up
from scripts.tables.ablations import published_part
from scripts.tables.formats import NOT_RUN, Cell, Part, Table, cell, text_of
from scripts.tables.paper import EDITIONS, paper_table
from scripts.tables.summary import Summary, embedded, kept_apart, shown

MODEL = "llava_1_5_7b"
TEXT_TOKENS = 118  # the authors' formula gives the paper's column at this length
_COUNT = "`.venv/bin/python -m eval.measure.flops`"
_TIME = (
    f"`.venv/bin/python -m eval.measure.latency none:full sparsevlm:192 sparsevlm:128 sparsevlm:64 --model {MODEL} "
    f"--text-tokens {TEXT_TOKENS} --dtype float16`"
)


def efficiency_paper(runs: Sequence[Run]) -> Table:
    """Tokens, accuracy, memory, latency and multiply-adds of LLaVA-1.5-7B: ours | paper."""
    edition = EDITIONS[0]
    accuracy = paper_table(edition, runs)
    averages = [i for i, name in enumerate(accuracy.columns) if name.startswith("average %")]
    counted, timed = _newest(runs, FLOPS), _newest(runs, LATENCY)
    rows = []
    for row in accuracy.rows:
        method, budget = text_of(row[0]), text_of(row[1])
        count, time = counted.get((method, budget)), timed.get((method, budget))
        rows.append([
            *row[:2],
            *(_ours(count, key, 1) for key in ("entering", "leaving")),
            *(row[i] for i in averages),
            _beside(_ours(time, "kv_mb", 1), method, budget, "kv_cache", "Section 5.3"),
            _beside(_ours(time, "prefill_ms", 1), method, budget, "latency"),
            _beside(_ours(count, "prefill_gmacs", 2, 1e-3), method, budget, "flops"),
        ])  # fmt: skip
    caption = (
        "Cost of LLaVA-1.5-7B. Tokens: mean visual tokens that enter a layer (what is computed) and that leave it (the "
        f"budget as the authors count it). Accuracy: averages as in {edition.name}, published (paper | rerun) and "
        "ours. KV cache of the visual tokens in MB, prefill in ms (the paper: A100-80GB) and multiply-adds of the "
        f"prefill in TMACs (the paper calls them TFLOPs) at {TEXT_TOKENS} text tokens: ours | paper. Prefill: the "
        "language model, and what the method computes itself, wherever it does. The paper's cache sizes are tokens "
        "times a constant, not measured (†). "
        f"{NOT_RUN}: nobody ran it here; {_COUNT} counts, {_TIME} times."
    )
    columns = ["method", "tokens", "entering", "leaving", *(accuracy.columns[i] for i in averages), "KV cache MB"]
    columns += ["prefill ms", "prefill TMACs"]
    return Table("efficiency_llava_1_5_7b", "Efficiency: LLaVA-1.5-7B", caption, columns, rows)


def _newest(runs: Sequence[Run], task: str) -> dict[tuple[str, str], tuple[dict, str]]:
    """Rows of the runs of a kind by method and budget; of several the newest."""
    found = {}
    for run in sorted((r for r in runs if r.task == task and r.model == MODEL), key=lambda r: r.metrics["date"]):
        for row in run.metrics["rows"]:
            if row["text_tokens"] == TEXT_TOKENS:
                if not {"method", "options", "budget"} <= set(row):
                    raise BadRun(f"{run.folder}: a row lacks its method, options or budget")
                found[label(row["method"], row["options"]), str(row["budget"])] = row, run.folder.name
    return found


def _ours(found: tuple[dict, str] | None, key: str, digits: int, factor: float = 1.0) -> Cell:
    if found is None or key not in found[0]:
        return (Part(NOT_RUN),)
    number = found[0][key]
    number = number["median"] if isinstance(number, dict) else number
    return cell(f"{factor * number:.{digits}f}", found[1])


def _beside(ours: Cell, method: str, budget: str, metric: str, table: str = "Table 1") -> Cell:
    tokens = "576" if budget == "full" else budget
    rows = look_up("SparseVLM", "v4", table, method=method, tokens=tokens, metric=metric, model=MODEL)
    paper = published_part(next(iter(rows.to_dict("records")), None))
    return (Part(ours[0].text, "ours", ours[0].runs), paper)


def efficiency_table(summary: Summary) -> Table:
    """The same of a group of runs, measured."""
    unit = " %" if summary.percent else ""
    timed = {} if summary.latency is None else {
        (label(r["method"], r["options"]), r["budget"]): r for r in summary.latency.metrics["rows"]
    }  # fmt: skip
    latency = () if summary.latency is None else (summary.latency.folder.name,)
    rows = []
    for row in summary.frame.to_dict("records"):
        run = () if pd.isna(row["run"]) else (row["run"],)
        time = timed.get((row["method"], row["budget"]))
        rows.append([
            cell(row["method"]), cell(str(row["budget"])),
            *(cell(number(row[key], digits), *run)
              for key, digits in (("entering", 1), ("leaving", 1), ("value", 1), ("retained", 1))),
            *(_timed(time, key, digits, latency)
              for key, digits in (("kv_mb", 2), ("peak_mb", 1), ("vision_ms", 1), ("prefill_ms", 1), ("decode_ms", 2))),
            cell(number(2 * row["prefill_gmacs"], 2), *run),
        ])  # fmt: skip
    group = summary.group
    where = "no latency run covers these settings" if not latency else f"times and memory from {latency[0]}"
    caption = (
        f"Efficiency: {group.task} on the model {group.model}, {group.n} questions, seed {group.seed}. "
        f"{embedded(group.model)}{kept_apart(group, summary.metric)}"
        "Mean visual tokens that enter and that leave a layer; memory of the KV cache and at "
        "the peak of the prefill; median times of image encoding (tower and projector), prefill (language model, and "
        "what the method computes itself, wherever it does) and one decoded token; GFLOPs (2 per multiply-add) of the "
        f"prefill. {NOT_RUN}: not measured; {where}. "
        "`python -m eval.measure.latency` measures them."
    )
    columns = ["method", "budget", "entering", "leaving", f"{shown(summary.metric)}{unit}", "retained %", "KV cache MB",
               "peak MB", "image ms", "prefill ms", "decode ms/token", "prefill GFLOPs"]  # fmt: skip
    title = f"Efficiency: {group.task}, {group.model}, {group.n} questions"
    return Table(f"efficiency__{group.name}", title, caption, columns, rows)


def _timed(row: dict | None, key: str, digits: int, latency: tuple[str, ...]) -> Cell:
    if row is None or row.get(key) is None:
        return cell(NOT_RUN)
    found = row[key]["median"] if isinstance(row[key], dict) else row[key]
    return cell(f"{found:.{digits}f}", *latency)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number, or that nobody ran it."""
    return NOT_RUN if pd.isna(value) else f"{value:{sign}.{digits}f}"


def half_precision_table(run: Run) -> Table:
    """One measurement of how many kept tokens half precision shares with float32."""
    rows: dict[tuple, dict[str, str]] = {}
    for row in run.metrics["rows"]:
        stage = tuple(str(row[key]) for key in ("model", "method", "budget", "layer"))
        rows.setdefault(stage, {})[row["dtype"]] = f"{100 * row['mean']:.1f} ({100 * row['smallest']:.1f})"
    dtypes = sorted({row["dtype"] for row in run.metrics["rows"]})
    caption = (
        "Share of the visual tokens kept in float32 that half precision keeps, too, in %: mean over prompts "
        f"(smallest). By `python -m eval.measure.half_precision`, from `{run.folder.name}`."
    )
    texts = [(*stage, *(found[dtype] for dtype in dtypes)) for stage, found in rows.items()]
    cells = [[cell(text, run.folder.name) for text in row] for row in texts]
    return Table(run.folder.name, "Half precision", caption, ["model", "method", "budget", "layer", *dtypes], cells, 4)
