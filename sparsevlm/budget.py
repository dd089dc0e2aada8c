"""Turning a budget ("192 tokens") into pruning layers and token counts.

A budget is the mean number of visual tokens per layer of the language model, counted as they *leave* each layer: the
count of the SparseVLM authors (issues 4 and 10 of their repository, modelling_sparse_llama.py:359). A layer after which
tokens are dropped counts with the shortened length although it was computed with the full one; the mean over what
*enters* the layers, the cost, is therefore higher. :class:`Schedule` states both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from sparsevlm.core.recycling import recycled_counts

# Share of a budget that the untouched layers before the first pruning layer may take up, else pruning starts earlier.
# The authors' smallest list uses 36 of 64 tokens (0.56); 12 layers at 64 of 576 tokens use 0.75.
_MAX_HEAD_SHARE = 0.8
_REFERENCE_LAYERS = (2, 6, 15)  # of 32: authors' modelling_sparse_llama.py, v1.5, main and v2.0
_REFERENCE_DEPTH = 32
_REFERENCE_TOKENS = 576


@dataclass(frozen=True)
class Schedule:
    """Visual tokens per layer, known before anything runs.

    Attributes:
        n_visual: visual tokens of the prompt.
        n_layers: layers of the language model.
        layers: 0-based indices of the layers on whose output pruning acts, ascending; -1 = at the model's input.
        keep: tokens kept at each of them.
        pool: dropped tokens that are recycled at each of them.
        merged: tokens that the pool is merged into; these stay, beside the kept ones.
    """

    n_visual: int
    n_layers: int
    layers: tuple[int, ...]
    keep: tuple[int, ...]
    pool: tuple[int, ...]
    merged: tuple[int, ...]

    @property
    def after(self) -> tuple[int, ...]:
        """Return the visual tokens after each pruning layer, merged ones included."""
        return tuple(k + m for k, m in zip(self.keep, self.merged, strict=True))

    def at(self, layer: int, count: int) -> tuple[int, int, int]:
        """Return keep, pool and merged counts after `layer`, which `count` tokens enter; nothing goes elsewhere."""
        if layer not in self.layers:
            return count, 0, 0
        i = self.layers.index(layer)
        return self.keep[i], self.pool[i], self.merged[i]

    @property
    def entering(self) -> float:
        """Return the mean visual tokens entering a layer."""
        return mean_entering(self.n_visual, self.layers, self.after, self.n_layers)

    @property
    def leaving(self) -> float:
        """Return the mean visual tokens leaving a layer: the budget that this schedule reaches."""
        return mean_leaving(self.n_visual, self.layers, self.after, self.n_layers)


def mean_entering(n_visual: int, layers: Sequence[int], after: Sequence[int], n_layers: int) -> float:
    """Average over the layers the visual tokens that enter them: layers 0 ... layers[0] see all of them."""
    return mean_leaving(n_visual, [layer + 1 for layer in layers], after, n_layers)


def mean_leaving(n_visual: int, layers: Sequence[int], after: Sequence[int], n_layers: int) -> float:
    """Average over the layers the visual tokens that leave them: layer layers[0] counts with what is left after it."""
    total, count, start = 0, n_visual, 0
    for layer, rest in zip(layers, after, strict=True):
        total += count * (max(layer, 0) - start)
        count, start = rest, max(layer, 0)
    return (total + count * (n_layers - start)) / n_layers


def scale_layers(
    n_layers: int, layers: Sequence[int] = _REFERENCE_LAYERS, depth: int = _REFERENCE_DEPTH
) -> tuple[int, ...]:
    """Scale pruning layers to another depth: floor(layer * n_layers / depth + 1/2), made strictly increasing.

    32 layers: 2, 6, 15; 40 layers (13B): 3, 8, 19; 12 layers (`mini`): 1, 2, 6. The authors' code uses 2, 6, 15 on
    every model; pass them as `layers` for that. Layers that do not fit into a shallow model are left out.
    """
    scaled: list[int] = []
    for layer in layers:
        new = int(layer * n_layers / depth + 0.5)
        new = max(new, scaled[-1] + 1) if scaled else new
        if new < n_layers - 1:
            scaled.append(new)
    return tuple(scaled) or (0,)


def check_budget(budget: int | float | str | None, n_visual: int | None = None) -> int | float | str | None:
    """Return the budget as an int (tokens), a float (a share of the input's visual tokens), "full" or None.

    Where the number of visual tokens is given, it is returned in tokens: a share to the nearest whole number, at least
    1; a number is clamped to what is there, as the trace records (`PrefillRecord.clamped`).

    Raises:
        ValueError: neither a whole number of at least 1 nor a share between 0 and 1.
    """
    if budget is None or budget == "full":
        return budget
    try:
        value = float(budget)
        if isinstance(budget, bool) or not (value.is_integer() or 0 < value < 1):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"budget {budget!r} is neither an integer nor 'full' nor a share. Use whole tokens, or a share between 0 "
            "and 1 of the input's visual tokens"
        ) from None
    if value < 1 and value.is_integer():
        raise ValueError(
            f"budget {int(value)} is below 1; it counts the mean visual tokens per layer. Use at least 1, or 'full'"
        )
    if value == 1 and not isinstance(budget, int) and "." in str(budget):
        raise ValueError(f"budget {budget} may mean one token or all of them. Use 1, or 'full'")
    if n_visual is None:
        return int(value) if value.is_integer() else value
    return min(int(value), n_visual) if value >= 1 else max(1, int(value * n_visual + 0.5))


def in_tokens(budget: int | float | str | None, n_visual: int) -> int:
    """Return `check_budget` of a budget that is neither None nor "full"."""
    tokens = check_budget(budget, n_visual)
    if not isinstance(tokens, int):
        raise ValueError(f"budget {budget!r} is no number of tokens. Use whole tokens, or a share between 0 and 1")
    return tokens


@lru_cache(maxsize=4096)
def explicit_schedule(
    n_visual: int,
    n_layers: int,
    layers: tuple[int, ...],
    keep: tuple[int, ...],
    recycle: float = 0.0,
    cluster: float = 0.1,
    always_drop: bool = False,
) -> Schedule:
    """Return the schedule of given layers and keep counts.

    `always_drop`: drop at least one token at each layer as the authors' code does (score.py:41), even when fewer are
    there than may be kept.

    Raises:
        ValueError: layers not ascending or outside the model, lengths differ, or a keep count below 1.
    """
    check_layers(layers, n_layers)
    if len(layers) != len(keep):
        raise ValueError(f"layers {layers} and keep {keep} differ in length. Use one keep count per layer")
    if any(k < 1 for k in keep):
        raise ValueError(f"keep {keep} contains a count below 1. Use counts of at least 1")
    count, kept, pools, merged = n_visual, [], [], []
    for k in keep:
        k = min(k, count - 1 if always_drop and count > 1 else count)
        pool, new = recycled_counts(count - k, recycle, cluster)
        kept.append(k)
        pools.append(pool)
        merged.append(new)
        count = k + new
    return Schedule(n_visual, n_layers, layers, tuple(kept), tuple(pools), tuple(merged))


def check_layers(layers: Sequence[int], n_layers: int) -> None:
    """Raise ValueError unless `layers` ascend strictly within -1 ... n_layers - 2."""
    if any(b <= a for a, b in pairwise(layers)):
        raise ValueError(f"pruning layers {tuple(layers)} do not ascend strictly. Use ascending layers")
    outside = [layer for layer in layers if not -1 <= layer <= n_layers - 2]
    if outside:
        raise ValueError(
            f"pruning layers {outside} do not fit a model of {n_layers} layers: pruning acts on the output of a layer "
            f"that another one follows. Use 0 ... {n_layers - 2}"
        )


@lru_cache(maxsize=4096)
def solve(
    budget: int,
    n_visual: int,
    n_layers: int,
    lists: tuple[tuple[int, tuple[int, ...]], ...],
    layers: tuple[int, ...] | None = None,
    recycle: float = 0.3,
    cluster: float = 0.1,
) -> Schedule:
    """Turn a budget into a schedule whose `leaving` mean is the budget, to within half a token.

    The authors' lists are returned as they are for 576 tokens and 32 layers (their means: 192.03, 128.63, 96.94,
    64.81). Elsewhere they are the shape: tokens after each stage as a share of all, interpolated linearly in
    budget / tokens (and over relative depth for other numbers of stages), then scaled to meet the budget.
    The layers are those of `scale_layers`; where the layers before the first one would take up more than 0.8 of the
    budget, pruning starts earlier, down to layer 0. A stage whose target is too small to hold its recycled tokens
    beside one kept token does not recycle.

    Args:
        budget: mean visual tokens leaving a layer, as in `check_budget`.
        n_visual: visual tokens of the prompt.
        n_layers: layers of the language model.
        lists: the authors' (budget, keep list) pairs, ascending in budget.
        layers: pruning layers, None = scaled from 2, 6, 15 of 32.
        recycle, cluster: shares of `recycled_counts`.

    Raises:
        ValueError: no budget, or one that is not reachable with the given layers.
    """
    budget = in_tokens(budget, n_visual)
    chosen = scale_layers(n_layers) if layers is None else tuple(layers)
    check_layers(chosen, n_layers)
    default = layers is None or chosen == _REFERENCE_LAYERS
    if default and (n_visual, n_layers) == (_REFERENCE_TOKENS, _REFERENCE_DEPTH) and budget in dict(lists):
        return explicit_schedule(n_visual, n_layers, chosen, dict(lists)[budget], recycle, cluster)
    if layers is None:
        chosen = (start_earlier(chosen[0], budget, n_visual, n_layers), *chosen[1:])
    widths = [b - max(a, 0) for a, b in zip(chosen, (*chosen[1:], n_layers), strict=True)]
    rest = budget * n_layers - max(chosen[0], 0) * n_visual
    if rest < sum(widths):
        floor = mean_leaving(n_visual, chosen, [1] * len(chosen), n_layers)
        raise ValueError(
            f"budget {budget} is out of reach of pruning layers {chosen}: the layers before them alone see all "
            f"{n_visual} visual tokens, so the mean is at least {floor:.1f}. Use earlier layers, or a larger budget"
        )
    shape = _shape(budget / n_visual, tuple(layer / n_layers for layer in chosen), lists, recycle, cluster)
    targets = _fit(rest, widths, shape, n_visual)
    count, keep, pools, merged = n_visual, [], [], []
    for target in targets:
        k, pool, new = _stage(count, target, recycle, cluster)
        keep.append(k)
        pools.append(pool)
        merged.append(new)
        count = k + new
    return Schedule(n_visual, n_layers, chosen, tuple(keep), tuple(pools), tuple(merged))


def start_earlier(first: int, budget: int, n_visual: int, n_layers: int) -> int:
    """Return `first`, or fewer layers where `first` layers with every token take up more than 0.8 of the budget."""
    reachable = (budget - 1) * n_layers // max(1, n_visual - 1)  # with a single token left from there on
    return min(first, int(_MAX_HEAD_SHARE * budget * n_layers / n_visual), reachable)


def nearest(schedule: Callable[[float], Schedule], mean: Callable[[Schedule], float], budget: int) -> Schedule:
    """Find the schedule whose mean is nearest to the budget, among those that grow with a share from 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(schedule(middle)) <= budget else (low, middle)
    below, above = schedule(low), schedule(high)
    return above if mean(above) - budget <= budget - mean(below) else below


def _stage(count: int, target: int, recycle: float, cluster: float) -> tuple[int, int, int]:
    """Return counts to keep, pool and merge that leave `target` of `count` tokens, without recycling if need be."""
    for k in range(target, 0, -1):
        pool, merged = recycled_counts(count - k, recycle, cluster)
        if k + merged == target:
            return k, pool, merged
    return target, 0, 0


def _shape(share: float, depths: tuple[float, ...], lists, recycle: float, cluster: float) -> list[float]:
    """Interpolate between the authors' lists: tokens after each stage as a share of all tokens."""
    anchors = []
    for budget, keep in lists:
        after = explicit_schedule(
            _REFERENCE_TOKENS, _REFERENCE_DEPTH, _REFERENCE_LAYERS, tuple(keep), recycle, cluster
        ).after
        anchors.append((budget / _REFERENCE_TOKENS, [a / _REFERENCE_TOKENS for a in after]))
    anchors.append((1.0, [1.0] * len(_REFERENCE_LAYERS)))
    low = anchors[0]
    if share <= low[0]:
        row = [value * share / low[0] for value in low[1]]
    else:
        (x0, y0), (x1, y1) = next(p for p in pairwise(anchors) if p[1][0] >= share)
        t = (share - x0) / (x1 - x0)
        row = [a + t * (b - a) for a, b in zip(y0, y1, strict=True)]
    if len(depths) == len(row):
        return row
    reference = [layer / _REFERENCE_DEPTH for layer in _REFERENCE_LAYERS]
    return [_interpolate(d, reference, row) for d in depths]


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= x1:
            return y0 + (x - x0) / (x1 - x0) * (y1 - y0)
    return ys[-1]


def _fit(rest: int, widths: list[int], shape: list[float], n_visual: int) -> list[int]:
    """Find non-increasing integers t proportional to `shape` with sum(widths * t) as close to `rest` as possible."""

    def targets(scale: float) -> list[int]:
        out, bound = [], n_visual
        for s in shape:
            bound = min(bound, max(1, int(scale * s * n_visual)))
            out.append(bound)
        return out

    def total(t: list[int]) -> int:
        return sum(w * x for w, x in zip(widths, t, strict=True))

    low, high = 0.0, 2 / min(shape)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(targets(middle)) <= rest else (low, middle)
    out = targets(low)
    for i in sorted(range(len(out)), key=lambda j: -widths[j]):  # hand out what rounding left, widest stage first
        bound = out[i - 1] if i else n_visual
        out[i] += max(0, min((rest - total(out)) // widths[i], bound - out[i]))
    short = rest - total(out)  # less than any width: one token more may come nearer
    room = [i for i in range(len(out)) if out[i] < (out[i - 1] if i else n_visual)]
    best = min(room, key=lambda i: abs(short - widths[i]), default=None)
    if best is not None and abs(short - widths[best]) < short:
        out[best] += 1
    return out
