"""What in the published numbers can be computed from others of the same paper, and whether it was.

    python scripts/recompute.py        # lists every ratio, average and claim that does not follow

A printed number is rounded, and so are those it is made of: it is said not to follow only if no numbers that round to
the printed ones give it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from scripts.published import decimals, published

FLOPS_TEXT_TOKENS = 118


@dataclass(frozen=True)
class Check:
    """One printed number and what it should be.

    Attributes:
        row: its label in the frame.
        value: recomputed from the printed numbers.
        low, high: the same from the smallest and the largest numbers that round to the printed ones.
        rule: how.
    """

    row: int
    value: float
    low: float
    high: float
    rule: str


def follows(check: Check, frame: pd.DataFrame) -> bool:
    """Whether the printed number is one that rounding allows."""
    printed, half = frame["number"][check.row], _half(frame["value"][check.row])
    return printed - half <= check.high + 1e-9 and printed + half >= check.low - 1e-9


def _half(text: str) -> float:
    return 0.5 * 10 ** -decimals(text)


def checks(frame: pd.DataFrame) -> list[Check]:
    """All that can be recomputed."""
    rules = (_retained, _averages, _differences, _recycling, _claims, _gains, _by_formula, _others)
    return [check for rule in rules for check in rule(frame)]


class _Rows:
    """The rows of one table of one paper, by method, tokens, benchmark and metric."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        keys = zip(frame["method"], frame["tokens"], frame["benchmark"], frame["metric"], strict=True)
        self.index = dict(zip(keys, frame.index, strict=True))

    def get(self, *key: str) -> int | None:
        return self.index.get(key)

    def unpruned(self, benchmark: str, metric: str) -> int | None:
        found = [i for (m, _, b, name), i in self.index.items() if (m, b, name) == ("none", benchmark, metric)]
        return found[0] if found else None

    def settings(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((m, t) for m, t, _, _ in self.index))


def _tables(frame: pd.DataFrame) -> Iterator[tuple[tuple, _Rows]]:
    for key, rows in frame.groupby(["paper", "version", "table", "model"], sort=False):
        yield key, _Rows(rows)


def _check(frame: pd.DataFrame, row: int, sources: list[int], rule: Callable[..., float], name: str) -> Check:
    """Interval arithmetic by corners; every rule here is monotonic in each of its numbers."""
    numbers = [frame["number"][i] for i in sources]
    halves = [_half(frame["value"][i]) for i in sources]
    if len(sources) <= 4:
        corners = [rule(*c) for c in product(*[(x - h, x + h) for x, h in zip(numbers, halves, strict=True)])]
    else:  # means and sums of many: all low, all high
        corners = [rule(*[x + s * h for x, h in zip(numbers, halves, strict=True)]) for s in (-1, 1)]
    return Check(row, rule(*numbers), min(corners), max(corners), name)


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole


def _mean(*values: float) -> float:
    return sum(values) / len(values)


def _difference(a: float, b: float) -> float:
    return a - b


def _retained(frame: pd.DataFrame) -> Iterator[Check]:
    """retained = score / unpruned score."""
    for _, rows in _tables(frame):
        for (method, tokens, benchmark, metric), i in rows.index.items():
            score, full = rows.get(method, tokens, benchmark, "score"), rows.unpruned(benchmark, "score")
            if metric == "retained" and score is not None and full is not None and benchmark != "average":
                yield _check(frame, i, [score, full], _percent, "score / unpruned score")


def _averages(frame: pd.DataFrame) -> Iterator[Check]:
    """Averages over the benchmarks of a table: of the scores, or of what is retained of them."""
    for (paper, _, table, _), rows in _tables(frame):
        if (paper, table) in (("HoloV", "Table 1"), ("GlobalCom2", "Table 1")):
            continue  # its unpruned scores, or some of its benchmarks, are not among the numbers
        for method, tokens in rows.settings():
            for metric in ("score", "judge_score", "judge_score_difference"):
                average = rows.get(method, tokens, "average", metric)
                parts = _parts(rows, method, tokens, metric)
                if average is not None and len(parts) > 1 and frame["unit"][[average, *parts]].nunique() == 1:
                    yield _check(frame, average, parts, _mean, f"mean of {len(parts)} benchmarks")
            average = rows.get(method, tokens, "average", "retained")
            pair = [rows.get(method, tokens, "average", "score"), rows.unpruned("average", "score")]
            if average is not None and None not in pair:
                yield _check(frame, average, pair, _percent, "average / unpruned average")
                continue
            scores = _parts(rows, method, tokens, "score")
            full = [rows.unpruned(frame["benchmark"][i], "score") for i in scores]
            if average is not None and len(scores) > 2 and None not in full and _complete(rows, scores):
                ratios = [_check(frame, average, [a, b], _percent, "") for a, b in zip(scores, full, strict=True)]
                low, value, high = (_mean(*[getattr(r, k) for r in ratios]) for k in ("low", "value", "high"))
                yield Check(average, value, low, high, f"mean of score / unpruned score over {len(scores)} benchmarks")
    video = _Rows(frame[(frame["paper"] == "SparseVLM") & (frame["table"] == "Table 3") & (frame["version"] == "v4")])
    text = frame[(frame["table"] == "Section 4.2") & (frame["metric"] == "retained")]
    for i, method, tokens in zip(text.index, text["method"], text["tokens"], strict=True):
        parts = [j for (m, t, b, k), j in video.index.items() if (m, t, k) == (method, tokens, "retained")]
        yield _check(frame, i, parts, _mean, "mean of what is retained in Table 3")


def _parts(rows: _Rows, method: str, tokens: str, metric: str) -> list[int]:
    return [i for (m, t, b, k), i in rows.index.items() if (m, t, k) == (method, tokens, metric) and b != "average"]


def _complete(rows: _Rows, scores: list[int]) -> bool:
    """Whether these are all benchmarks of the table (rows quoted in part have no average that could be checked)."""
    return len(scores) == sum(m == "none" and k == "score" and b != "average" for m, _, b, k in rows.index)


def _differences(frame: pd.DataFrame) -> Iterator[Check]:
    """Judge's scores: difference to the unpruned model."""
    for _, rows in _tables(frame):
        for (method, tokens, benchmark, metric), i in rows.index.items():
            score, full = rows.get(method, tokens, benchmark, "judge_score"), rows.unpruned(benchmark, "judge_score")
            if metric == "judge_score_difference" and score is not None and full is not None:
                yield _check(frame, i, [score, full], _difference, "difference to the unpruned score")


def _recycling(frame: pd.DataFrame) -> Iterator[Check]:
    """The ablation of recycling: means over budgets, and the gains that the text names."""
    with_it, without = "sparsevlm", "sparsevlm (recycle=0.0)"
    rows = _Rows(frame[(frame["paper"] == "SparseVLM") & (frame["version"] == "v4") & (frame["table"] == "Table 4")])
    for method, benchmark in product((with_it, without), ("gqa", "pope")):
        parts = [rows.get(method, t, benchmark, "score") for t in ("64", "96", "128", "192")]
        yield _check(frame, rows.get(method, "mean", benchmark, "score"), parts, _mean, "mean over budgets")
    text = frame[(frame["metric"] == "gain_by_recycling") & (frame["version"] == "v4")]
    for i, tokens, benchmark in zip(text.index, text["tokens"], text["benchmark"], strict=True):
        pair = [rows.get(method, tokens, benchmark, "score") for method in (with_it, without)]
        if None not in pair:
            yield _check(frame, i, pair, _difference, "difference in Table 4")


def _claims(frame: pd.DataFrame) -> Iterator[Check]:
    """Claims of abstracts and texts about a row of Table 1."""
    for version in ("v1", "v4"):
        own = frame[(frame["paper"] == "SparseVLM") & (frame["version"] == version)]
        table = _Rows(own[own["table"] == "Table 1"])
        claims = own[(own["table"] != "Table 1") & (own["model"] == "llava_1_5_7b") & (own["method"] == "sparsevlm")]
        for i, tokens, metric in zip(claims.index, claims["tokens"], claims["metric"], strict=True):
            saved = {"flops_reduction": "flops", "latency_reduction": "latency"}.get(metric)
            if saved and table.get("sparsevlm", tokens, "efficiency", saved) is not None:
                pair = [table.get("sparsevlm", tokens, "efficiency", saved), table.unpruned("efficiency", saved)]
                yield _check(frame, i, pair, lambda a, b: 100 - _percent(a, b), f"Table 1, {tokens} tokens")
            elif metric == "retained" and tokens in ("192", "128", "64"):
                source = [table.get("sparsevlm", tokens, "average", "retained")]
                yield _check(frame, i, source, float, f"Table 1, {tokens} tokens")
            elif metric == "compression":
                value = 100 - _percent(float(tokens), 576)
                yield Check(i, value, value, value, "tokens of 576")
            elif metric == "kv_cache_reduction":
                pair = [own.index[(own["metric"] == "kv_cache") & (own["tokens"] == t)][0] for t in ("192", "576")]
                yield _check(frame, i, pair, lambda a, b: 100 - _percent(a, b), "of the two sizes beside it")


def _gains(frame: pd.DataFrame) -> Iterator[Check]:
    """Gains over FastV: differences of averages."""
    for version in ("v1", "v4"):
        own = frame[(frame["paper"] == "SparseVLM") & (frame["version"] == version)]
        images = _Rows(own[own["table"] == "Table 1"])
        pairs = [
            [images.get(m, t, "average", "retained") for m in ("sparsevlm", "fastv")] for t in ("192", "128", "64")
        ]
        for end, pick in (("smallest", min), ("largest", max)):
            claim = own.index[(own["metric"] == f"gain_over_fastv_{end}") & (own["model"] == "llava_1_5_7b")]
            pair = pick(pairs, key=lambda p: frame["number"][p[0]] - frame["number"][p[1]])
            yield from (_check(frame, i, pair, _difference, "difference of averages in Table 1") for i in claim)
        video = own[
            (own["model"] == "video_llava_7b") & (own["benchmark"] == "average") & (own["metric"] == "retained")
        ]
        pair = [video.index[video["method"] == m][0] for m in ("sparsevlm", "fastv")]
        claim = own.index[(own["metric"] == "gain_over_fastv") & (own["model"] == "video_llava_7b")]
        yield from (_check(frame, i, pair, _difference, "difference of averages") for i in claim)


def _by_formula(frame: pd.DataFrame) -> Iterator[Check]:
    """Token averages and FLOPs of the authors' lists, by the formulas of their code."""
    for version in ("main, 1_0", "main, 2_0"):
        own = frame[(frame["paper"] == "SparseVLM code") & (frame["version"] == version)]
        for i, tokens, metric in zip(own.index, own["tokens"], own["metric"], strict=True):
            if metric in ("tokens_leaving", "tokens_entering", "flops_by_formula_118_text_tokens"):
                lists = own[(own["tokens"] == tokens) & (own["metric"] == "kept_visual_tokens")]["number"]
                leaving, entering = per_layer([int(k) for k in lists], recycled=version == "main, 1_0")
                value = {
                    "tokens_leaving": _mean(*leaving),
                    "tokens_entering": _mean(*entering),
                    "flops_by_formula_118_text_tokens": formula_tflops(entering),
                }[metric]
                yield Check(i, value, value, value, "formula of the authors' code")


def per_layer(kept: list[int], recycled: bool) -> tuple[list[int], list[int]]:
    """Visual tokens leaving and entering each of the 32 layers when `kept` stay after layers 2, 6 and 15 of 576."""
    now, leaving, entering = 576, [], []
    at = dict(zip((2, 6, 15), kept, strict=False))
    for layer in range(32):
        entering.append(now)
        if layer in at:
            dropped = now - at[layer]
            now = at[layer] + ((int(0.3 * dropped) + 1) // 10 + 1 if recycled else 0)
        leaving.append(now)
    return leaving, entering


def formula_tflops(visual: list[int]) -> float:
    """The authors' formula, 4 n d^2 + 2 n^2 d + 3 n d m per layer: multiply-adds, which they call FLOPs."""
    d, m = 4096, 11008
    lengths = [v + FLOPS_TEXT_TOKENS for v in visual]
    return sum(4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m for n in lengths) / 1e12


def _others(frame: pd.DataFrame) -> Iterator[Check]:
    """Ratios in other papers' tables."""
    for _, rows in _tables(frame):
        for (method, tokens, benchmark, metric), i in rows.index.items():
            if metric == "speedup":
                pair = [rows.unpruned(benchmark, "total_time"), rows.get(method, tokens, benchmark, "total_time")]
                yield _check(frame, i, pair, lambda a, b: a / b, "ratio of total times")
            elif metric == "f1":
                pair = [rows.get(method, tokens, benchmark, k) for k in ("precision", "recall")]
                yield _check(frame, i, pair, lambda p, r: 2 * p * r / (p + r), "of precision and recall")


def main() -> None:
    """Print what does not follow."""
    frame = published()
    found = checks(frame)
    for check in found:
        if not follows(check, frame):
            row = frame.loc[check.row]
            print(
                f"{row['paper']} {row['version']}, {row['table']}: {row['method']} {row['tokens']} {row['benchmark']} "
                f"{row['metric']} is printed {row['value']}, but is {check.value:.2f} ({check.rule}) [{row['flag']}]"
            )
    print(f"{len(found)} numbers recomputed")


if __name__ == "__main__":
    main()
