"""Prefill against its floor, and where pruning spends its time, from the benchmark's latency.json.

Reads `<results>/latency/latency.json` (made by `python -m sparsevlm.cost.bench`; nothing is drawn where there is none)
and writes `latency__<shape>__<prompt>__b<batch>.png` and `.pdf` to `<results>/figures/`, one per group of settings
that were timed together. Left: the unpruned and the pruned prefill, with a mark where the floor is. Right: the same
settings' parts.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import sparsevlm  # isort: skip  # noqa: F401  - before transformers: it makes torchvision importable

from scripts.figures import style
from sparsevlm.cost.ledger import SCHEMA, Group
from sparsevlm.cost.report import name_of, part_names

_GROUP = tuple(Group.__dataclass_fields__)


def plot(results: Path) -> list[Path]:
    """Draw a figure per group; returns the files' paths, none if nothing was measured.

    Raises:
        ValueError: not a file of this schema.
    """
    source = results / "latency" / "latency.json"
    if not source.exists():
        return []
    content = json.loads(source.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{source}: its schema is {content.get('schema')!r}, this version reads {SCHEMA}")
    groups = [list(rows) for _, rows in groupby(content["rows"], key=lambda row: [row[key] for key in _GROUP])]
    names = [_name(rows[0]) for rows in groups]
    paths = []
    for rows, name in zip(groups, names, strict=True):
        if names.count(name) > 1:
            name += "".join(f"__{rows[0][key]}" for key in ("dtype", "attention", "threads"))
        rows = [row for row in rows if "prefill_ms" in row]
        if any(row.get("parts_ms") for row in rows):
            paths += style.save(draw(rows), results / "figures", name)
    return paths


def _name(row: dict) -> str:
    return f"latency__{row['shape']}__{row['prompt'].replace('+', '-')}__b{row['batch_size']}"


@style.styled()
def draw(rows: list[dict]):
    """Figure of one group: prefill and floor at the left, parts at the right."""
    fig, (left, right) = style.figure(0.9 + 0.22 * len(rows), 2 * style.COLUMN_INCHES, 1, 2)
    places = range(len(rows), 0, -1)
    labels = [name_of(row) + ("" if row["budget"] in (None, "full") else f", {row['budget']}") for row in rows]
    medians = [row["prefill_ms"]["median"] for row in rows]
    spread = [
        [row["prefill_ms"]["median"] - row["prefill_ms"]["q25"] for row in rows],
        [row["prefill_ms"]["q75"] - row["prefill_ms"]["median"] for row in rows],
    ]
    left.barh(places, medians, 0.6, xerr=spread, color="#bbbbbb", error_kw={"elinewidth": 0.8, "capsize": 1.5})
    floors = [(row["floor_ms"]["median"], y) for row, y in zip(rows, places, strict=True) if row.get("floor_ms")]
    if floors:
        left.plot(*zip(*floors, strict=True), "|", color="black", markersize=11, markeredgewidth=1.6, label="floor")
    left.set_yticks(places, labels)
    left.set_xlabel("prefill, ms")
    names = part_names(rows)
    looks = style.looks(names)
    start = [0.0] * len(rows)
    for name in names:
        widths = [row["parts_ms"].get(name, {"median": 0.0})["median"] for row in rows]
        right.barh(places, widths, 0.6, left=start, color=looks[name]["color"], label=name, edgecolor="white", lw=0.3)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set_yticks(places, [])
    right.set_xlabel("of it pruning, ms")
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
    first = rows[0]
    where = (
        first["device"]
        if first["device"] != "cpu"
        else f"CPU, {first['threads']} thread" + "s" * (first["threads"] > 1)
    )
    fig.suptitle(
        f"{first['shape']}, {first['prompt']} tokens, batch {first['batch_size']}, {first['dtype']}, {where}",
        fontsize=8,
    )
    fig.legend(frameon=False, loc="outside lower center", ncols=len(names) + 1)
    return fig
