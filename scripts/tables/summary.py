"""From a group of runs to one frame of numbers, which tables and figures share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from eval.runs.reader import LATENCY, Group, Run, label, of_language_control, setting_key
from eval.runs.stats import paired_difference
from eval.tasks.minivqa.utils import LANGUAGE_CONTROL, VISUAL

UNPRUNED = "none"
MATCHED = "random_layer (match=sparsevlm)"  # random tokens at the layers and in the numbers of SparseVLM
_FIRST = (UNPRUNED, "random")  # then the others by name


@dataclass(frozen=True)
class Summary:
    """One group in numbers.

    Attributes:
        group: the runs.
        metric: which of their metrics.
        percent: whether the metric is a share, shown in %; else its own unit is.
        frame: one row per method and budget, also of settings that were not run (NaN everywhere). `method` is the name
            with options that are not defaults, `budget` is an int, "full" or "explicit". `value`, `low`, `high` (95 %),
            `difference` to the unpruned run with `difference_low` and `difference_high` (paired), the same as
            `control` to the run of random tokens that has as many tokens in every layer (MATCHED), `retained` in %,
            `entering`, `leaving`, `prefill_gmacs`, `prefill_ms` and `prefill_ratio` with `_q25` and `_q75`, `run`, and
            `not_judged`: True where the run lacks the metric because no language model judged.
        latency: the latency run that the times are from, or None.
    """

    group: Group
    metric: str
    percent: bool
    frame: pd.DataFrame
    latency: Run | None


def embedded(model: str) -> str:
    """What is to be said wherever numbers of an embedded model stand."""
    if not model.startswith("mini"):
        return ""
    return "This is the small embedded model, not a 7B: its numbers say nothing about LLaVA-1.5. "


def shown(metric: str) -> str:
    """A metric as it is printed."""
    return "visual accuracy" if metric == VISUAL else metric


def kept_apart(group: Group, metric: str) -> str:
    """What is to be said of a metric that leaves the language control out; nothing of others."""
    if metric != VISUAL:
        return ""
    left_out = [[s["scores"]["accuracy"] for s in run.samples if of_language_control(s)] for run in group.runs]
    found = [f"{100 * sum(scores) / len(scores):.1f}" for scores in left_out if scores]
    if not found:  # the first questions of a set may have none
        return ""
    low, high = (sorted(found, key=float)[i] for i in (0, -1))
    return (
        f"Visual accuracy is that of the {group.n - len(left_out[0])} questions that need the picture; the language "
        f"control (`{'`, `'.join(LANGUAGE_CONTROL)}`, {len(left_out[0])} questions that need none) is kept apart: "
        f"{low if low == high else f'{low} to {high}'} % in all runs here. "
    )


def summarise(group: Group, runs: Iterable[Run], metric: str | None = None) -> Summary:
    """Numbers of a group.

    Args:
        group: from `eval.runs.reader.accuracy_groups`.
        runs: all runs; among them the latency run is chosen that covers most of the group's settings, of several the
            newest.
        metric: which metric; default: the visual accuracy, "accuracy", or else the first one.

    Raises:
        ValueError: a run does not have the metric; the message lists what it has.
    """
    metric, percent = metric_of(group, metric)
    latency = _latency_run(group, runs)
    controls = {
        r.metrics["budget"]: r for r in group.runs if label(r.metrics["method"], r.metrics["options"]) == MATCHED
    }
    rows = []
    for run in group.runs:
        scale, control = 100.0 if percent else 1.0, controls.get(run.metrics["budget"])
        rows.append(_row(run, group.unpruned, metric, scale, latency) | _to_control(run, control, metric, scale))
    return Summary(group, metric, percent, _with_gaps(pd.DataFrame(rows)), latency)


def metric_of(group: Group, metric: str | None = None) -> tuple[str, bool]:
    """The metric to show of a group, and whether it is a share, shown in %.

    Without `metric` it is the accuracy on questions that need the picture, accuracy, or else the first one of a run
    that lacks none.

    Raises:
        ValueError: a run does not have the metric asked for; the message lists what it has.
    """
    known = min(group.runs, key=lambda run: len(run.not_scored)).metrics["metrics"]
    metric = metric or next((name for name in (VISUAL, "accuracy") if name in known), next(iter(known)))
    scored = [run for run in group.runs if metric not in run.not_scored]
    for run in scored:
        if metric not in run.metrics["metrics"]:
            have = ", ".join(run.metrics["metrics"])
            raise ValueError(f"{run.folder} has no metric {metric!r}; it has {have}")
    entries = [run.metrics["metrics"][metric] for run in scored]
    return metric, all(0 <= x <= 1 for e in entries for x in [e["value"], *(e["ci95"] or [])])


def difference(run: Run, other: Run, metric: str) -> tuple[float, float, float]:
    """Mean of run - other over the questions, with its paired interval; see `eval.runs.stats.paired_difference`."""
    return _difference(*(tuple(r.scores(metric).items()) for r in (run, other)))


@lru_cache(maxsize=10_000)  # several tables and figures show the same difference
def _difference(scores: tuple, others: tuple) -> tuple[float, float, float]:
    return paired_difference(dict(scores), dict(others))


def _excluded(metrics: dict) -> str:
    """What a run could not answer, and therefore did not score, is said with its name."""
    return f", {metrics['excluded']} questions excluded" if metrics.get("excluded") else ""


def _latency_run(group: Group, runs: Iterable[Run]) -> Run | None:
    settings = {run.setting for run in group.runs}
    candidates = [r for r in runs if r.task == LATENCY and r.model == group.model and "shape" not in r.config]
    rated = [(len(settings & set(_latency_rows(r))), r.metrics["date"], r.folder.name, r) for r in candidates]
    rated = [entry for entry in rated if entry[0]]
    return max(rated, key=lambda entry: entry[:3])[3] if rated else None


def _latency_rows(run: Run) -> dict[str, dict]:
    return {setting_key(r["method"], r["options"], r["budget"]): r for r in run.metrics["rows"] if "prefill_ms" in r}


def _to_control(run: Run, control: Run | None, metric: str, scale: float) -> dict:
    """The difference to the matched control; none where it has not as many tokens in every layer."""
    if control is None or metric in {*run.not_scored, *control.not_scored}:
        return {}
    if any(abs(run.metrics["tokens"][k] - control.metrics["tokens"][k]) > 0.05 for k in ("entering", "leaving")):
        return {}
    mean, low, high = (scale * x for x in difference(run, control, metric))
    return {"control": mean, "control_low": low, "control_high": high}


def _row(run: Run, unpruned: Run | None, metric: str, scale: float, latency: Run | None) -> dict:
    m = run.metrics
    found = {"value": np.nan, "ci95": None} if metric in run.not_scored else m["metrics"][metric]
    value, interval = found["value"], found["ci95"]
    low, high = interval or (np.nan, np.nan)
    row = {
        "method": label(m["method"], m["options"]) + _excluded(m),
        "budget": m["budget"],
        "entering": m["tokens"]["entering"],
        "leaving": m["tokens"]["leaving"],
        "value": scale * value,
        "low": scale * low,
        "high": scale * high,
        "prefill_gmacs": np.nan if (gmacs := m["cost"].get("prefill_gmacs")) is None else gmacs,
        "run": run.folder.name,
        "not_judged": metric in run.not_scored,
    }
    if unpruned is not None and metric not in unpruned.not_scored:
        reference = unpruned.metrics["metrics"][metric]["value"]
        row["retained"] = 100 * value / reference if reference else np.nan
        row["difference"] = scale * (value - reference)
        if interval is not None:
            spread = difference(run, unpruned, metric)
            row["difference_low"], row["difference_high"] = scale * spread[1], scale * spread[2]
    timed = _latency_rows(latency).get(run.setting) if latency is not None else None
    for name in ("prefill_ms", "prefill_ratio"):
        for key, suffix in (("median", ""), ("q25", "_q25"), ("q75", "_q75")):
            row[name + suffix] = timed[name][key] if timed is not None else np.nan
    return row


_COLUMNS = [
    "method", "budget", "entering", "leaving", "value", "low", "high", "difference", "difference_low",
    "difference_high", "control", "control_low", "control_high", "retained", "prefill_gmacs", "prefill_ms",
    "prefill_ms_q25", "prefill_ms_q75", "prefill_ratio", "prefill_ratio_q25", "prefill_ratio_q75", "run", "not_judged",
]  # fmt: skip


def _with_gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted rows, with an empty one for each budget that some method was run at and this one was not."""
    frame = frame.reindex(columns=_COLUMNS)
    budgets = sorted({b for b in frame["budget"] if isinstance(b, int)}, reverse=True)
    have = set(zip(frame["method"], frame["budget"], strict=True))
    with_budget = {m for m, b in have if isinstance(b, int)}
    gaps = [{"method": m, "budget": b} for m in with_budget for b in budgets if (m, b) not in have]
    if UNPRUNED not in set(frame["method"]):
        gaps.append({"method": UNPRUNED, "budget": "full"})
    frame = pd.concat([frame, pd.DataFrame(gaps, columns=["method", "budget"])], ignore_index=True)
    order = sorted(frame.index, key=lambda i: place(frame["method"][i], frame["budget"][i]))
    return frame.loc[order].reset_index(drop=True)


def place(method: str, budget: int | str) -> tuple:
    """Sort key of a row: unpruned, random, then the methods by label, each from many tokens to few."""
    name = method.split(" ")[0]
    first = _FIRST.index(name) if name in _FIRST else len(_FIRST)
    return first, method, -budget if isinstance(budget, int) else -(10**9)
