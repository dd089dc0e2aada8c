"""Rank-adaptive numbers of tokens against fixed lists of as many: runs of `sparsevlm_rank` beside `sparsevlm`.

`experiment=ablation_rank` makes such runs on the embedded model.
"""

from __future__ import annotations

import numpy as np

from eval.runs.reader import Group, Run, label
from scripts.tables.ablations import interval
from scripts.tables.formats import NOT_RUN, Table, cell
from scripts.tables.summary import difference, embedded, kept_apart, metric_of, shown

ADAPTIVE, FIXED = "sparsevlm_rank", "sparsevlm"
_CLOSE = 0.03  # mean tokens of the two runs differ by no more than this share
_OWN = {"rule", "lam", "scale", "bias"}
_COUNTED_BY = {"keep", "layers"}  # the authors' rules prune at layers of their own


def rank_ablation(group: Group, metric: str | None = None) -> Table | None:
    """One row per run of the adaptive method, beside the closest fixed one in mean tokens; None without such runs."""
    metric, percent = metric_of(group, metric)
    group = group.scored(metric)
    scale, unit = (100.0, " %") if percent else (1.0, "")
    rows = []
    adaptive = [run for run in group.runs if run.metrics["method"] == ADAPTIVE]
    for run in sorted(adaptive, key=_leaving, reverse=True):
        fixed, name = _fixed(run, group), label(ADAPTIVE, run.metrics["options"])
        texts = [name, f"{_leaving(run):.1f}", _spread(run), _words(run), _value(run, metric, scale)]
        row = [cell(text, run.folder.name) for text in texts]
        if fixed is None:
            row += [cell(NOT_RUN)] * 3
        else:
            mean, low, high = (scale * x for x in difference(run, fixed, metric))
            pair = {"value": mean, "low": low, "high": high}
            row += [
                cell(f"{_leaving(fixed):.1f}", fixed.folder.name),
                cell(_value(fixed, metric, scale), fixed.folder.name),
                cell(interval(pair, sign="+"), run.folder.name, fixed.folder.name),
            ]
        rows.append(row)
    if not rows:
        return None
    caption = (
        f"Rank-adaptive sparsification against fixed keep lists with as many tokens (to {100 * _CLOSE:.0f} %): "
        f"{group.task} on the model {group.model}, {group.n} questions, seed {group.seed}. {embedded(group.model)}"
        f"{kept_apart(group, metric)}"
        "Tokens: mean visual tokens that leave a layer; fewest and most of a question; their correlation with the "
        f"length of the prompt. {shown(metric)}{unit} with 95 % bootstrap interval; adaptive less fixed, paired over "
        "the same questions."
    )
    columns = [
        "adaptive", "tokens", "fewest to most", "correlation with prompt length", f"{shown(metric)}{unit} [95 %]",
        "tokens of the fixed list", f"fixed: {shown(metric)}{unit} [95 %]", "difference [95 %]",
    ]  # fmt: skip
    return Table(f"rank__{group.name}", f"Rank-adaptive: {group.task}, {group.model}", caption, columns, rows, 1)


def _fixed(run: Run, group: Group) -> Run | None:
    """The run with fixed lists, otherwise the same options and nearly as many tokens."""
    wanted = {k: v for k, v in run.metrics["options"].items() if k not in _OWN | _COUNTED_BY}
    same = [
        other
        for other in group.runs
        if other.metrics["method"] == FIXED
        and {k: v for k, v in other.metrics["options"].items() if k not in _COUNTED_BY} == wanted
        and abs(_leaving(other) - _leaving(run)) <= _CLOSE * _leaving(run)
    ]
    return min(same, key=lambda other: abs(_leaving(other) - _leaving(run)), default=None)


def _leaving(run: Run) -> float:
    return run.metrics["tokens"]["leaving"]


def _spread(run: Run) -> str:
    counts = [sample["leaving"] for sample in run.samples]
    return f"{min(counts):.1f} to {max(counts):.1f}"


def _words(run: Run) -> str:
    counts, lengths = (np.array([sample[key] for sample in run.samples]) for key in ("leaving", "input_tokens"))
    if np.ptp(counts) == 0 or np.ptp(lengths) == 0:
        return "all alike"
    return f"{np.corrcoef(counts, lengths)[0, 1]:.2f}"


def _value(run: Run, metric: str, scale: float) -> str:
    entry = run.metrics["metrics"][metric]
    low, high = entry["ci95"] or (np.nan, np.nan)
    return interval({"value": scale * entry["value"], "low": scale * low, "high": scale * high})
