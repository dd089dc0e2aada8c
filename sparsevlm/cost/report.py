"""From a benchmark's ledger to latency.json, latency.md and latency.csv.

    python -m sparsevlm.cost.report results/latency

The three are made from the ledger and from nothing else, and made anew each time.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from sparsevlm.cost.latency import summary
from sparsevlm.cost.ledger import SCHEMA, Group, Ledger, Record
from sparsevlm.cost.memory import PEAK_MEASURE
from sparsevlm.markdown import markdown_of_records
from sparsevlm.runtime.parts import PARTS

NOT_RUN = "not run"
_MIB = 1 << 20


def main(argv: list[str] | None = None) -> None:
    """Write the report of a folder and print the files' names."""
    parser = argparse.ArgumentParser(description="Tables of a finished or unfinished benchmark.")
    parser.add_argument("folder", type=Path, help="that holds ledger.jsonl")
    folder = parser.parse_args(argv).folder
    try:
        ledger = Ledger(folder)
        if not ledger.records:
            raise ValueError(f"{ledger.path} is not there or empty: make it with python -m sparsevlm.cost.bench")
        for path in write(ledger, folder):
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")


def write(ledger: Ledger, folder: Path) -> list[Path]:
    """Write the three files, each in one step; returns their paths."""
    rows = rows_of(ledger)
    content = {"schema": SCHEMA, "machine": ledger.machine, "rows": rows}
    texts = {
        "latency.json": json.dumps(content, indent=1, default=list) + "\n",
        "latency.md": text(rows, ledger.machine),
        "latency.csv": table_csv(rows),
    }
    return [_replace(folder / name, made) for name, made in texts.items()]


def _replace(path: Path, content: str) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(content)
    os.chmod(name, 0o644)
    os.replace(name, path)
    return path


def rows_of(ledger: Ledger) -> list[dict]:
    """One row per setting, groups together, the unpruned model first: what `latency.summary` gives, and `gmacs_ratio`
    and `speedup` against the unpruned model; or `failed`, or nothing where no round is finished."""
    records = sorted(ledger.records.values(), key=lambda r: str(r.group))  # stable: in a group as they came
    rows = []
    for group, members in groupby(records, key=lambda r: r.group):
        members = list(members)
        full = next((m for m in members if m.method == "none"), None)
        rows += [_row(group, member, full) for member in members]
    return rows


def _row(group: Group, record: Record, full: Record | None) -> dict:
    row = {**asdict(group), "method": record.method, "budget": record.budget, "options": record.options}
    row |= {"failed": record.failed, "n": len(record.samples)}
    if record.failed or not record.samples or record.facts is None:
        return row
    found = summary([record.samples[n] for n in sorted(record.samples)], record.facts)
    del found["rounds"]
    ratio = found["prefill_ratio"]
    found["speedup"] = ratio and {"median": 1 / ratio["median"], "q25": 1 / ratio["q75"], "q75": 1 / ratio["q25"]}
    found["gmacs_ratio"] = None
    if full is not None and full.facts is not None and record.facts.gmacs is not None:
        found["gmacs_ratio"] = full.facts.gmacs / record.facts.gmacs
    return {**row, **found}


def name_of(row: dict) -> str:
    """The method with its options, as it is printed."""
    options = ", ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in row["options"].items())
    return row["method"] + (f" ({options})" if options else "")


def cells(row: dict) -> dict[str, str]:
    """A row of the first table, as it is printed."""
    start = {"method": name_of(row), "budget": "explicit" if row["budget"] is None else str(row["budget"])}
    names = ["leaving", "prefill ms", "speed-up", "MAC ratio", "of the MAC ratio", "overhead", "overhead, CPU time",
             "of it method ms", "vision ms", "first token ms", "decode ms/token", "end to end ms", "peak MiB",
             "KV MiB"]  # fmt: skip
    if row["failed"] or "prefill_ms" not in row:
        return {**start, **dict.fromkeys(names, row["failed"] or NOT_RUN)}
    speedup, macs = row["speedup"], row["gmacs_ratio"]
    values = [
        f"{row['leaving']:.1f}",
        _spread(row["prefill_ms"], 1),
        _spread(speedup, 2),
        "not counted" if macs is None else f"{macs:.2f}",
        "-" if macs is None or speedup is None else f"{100 * speedup['median'] / macs:.0f} %",
        _spread(row["overhead"], 3),
        _spread(row["overhead_cpu"], 3) if row["device"] == "cpu" else "-",
        _spread(row["method_ms"], 2),
        _spread(row["vision_ms"], 1),
        _spread(row["first_token_ms"], 1),
        _spread(row["decode_ms"], 2),
        _spread(row["end_to_end_ms"], 1),
        f"{row['peak_bytes'] / _MIB:.1f}",
        f"{sum(row['kv_bytes']) / _MIB:.1f}",
    ]
    return {**start, **dict(zip(names, values, strict=True))}


def _spread(value: dict | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.{digits}f} [{value['q25']:.{digits}f}, {value['q75']:.{digits}f}]"


def part_names(rows: Sequence[dict]) -> list[str]:
    """Parts that occur, the known ones first and in their order."""
    found = {name for row in rows for name in row.get("parts_ms", {})}
    return [name for name in PARTS if name in found] + sorted(found - {*PARTS})


def part_cells(row: dict, names: Sequence[str]) -> dict[str, str]:
    """A row of the second table: medians in ms."""
    parts = row["parts_ms"]
    found = {name: f"{parts[name]['median']:.2f}" if name in parts else "0" for name in names}
    total = row["method_ms"]["median"]
    share = 100 * total / row["prefill_ms"]["median"]
    budget = "explicit" if row["budget"] is None else str(row["budget"])
    return {
        "method": name_of(row),
        "budget": budget,
        **found,
        "together": f"{total:.2f}",
        "% of prefill": f"{share:.1f}",
    }


def text(rows: Sequence[dict], machine: dict) -> str:
    """All tables as Markdown."""
    out = [f"# Latency, overhead and memory\n\n{_about(machine)}\n"]
    for _, members in groupby(rows, key=lambda r: [r[k] for k in Group.__dataclass_fields__]):
        members = list(members)
        first = members[0]
        out.append(f"## {first['shape']}, batch {first['batch_size']}\n\n{_conditions(members, machine)}\n")
        out.append(markdown_of_records([cells(m) for m in members], left=2) + "\n")
        out.append(verdict(members) + "\n")
        pruned = [m for m in members if m.get("parts_ms")]
        if pruned:
            names = part_names(pruned)
            out.append("Where pruning spends its time, ms in one prefill:\n")
            out.append(markdown_of_records([part_cells(m, names) for m in pruned], left=2) + "\n")
    return "\n".join(out)


def verdict(members: Sequence[dict]) -> str:
    """Which settings of a group are slower than the unpruned model, or reach less than 90 % of what MACs promise."""
    compared = [m for m in members if m["method"] != "none" and m.get("speedup")]
    slower = [m for m in compared if m["speedup"]["median"] < 1]
    short = [m for m in compared if m["gmacs_ratio"] and m["speedup"]["median"] < 0.9 * m["gmacs_ratio"]]
    found = []
    for what, which in (("Slower than the unpruned model", slower), ("Below 90 % of the MAC ratio", short)):
        names = [name_of(m) + ("" if m["budget"] is None else f" {m['budget']}") for m in which]
        found.append(f"{what}: {', '.join(names) or 'none'}, of {len(compared)} settings.")
    return " ".join(found)


def _conditions(members: Sequence[dict], machine: dict) -> str:
    first = members[0]
    before, visual, after = first["prompt"].split("+")
    where = machine["gpu"] or machine["cpu"]
    if first["device"] == "cpu":
        where += f", {first['threads']} thread{'s' * (first['threads'] > 1)}"
    numbers = [m["n"] for m in members if "prefill_ms" in m] or [0]
    rounds = "-".join(map(str, sorted({min(numbers), max(numbers)})))
    return (
        f"{before} text, {visual} visual and {after} text tokens; {first['dtype']}, {first['attention']}, on {where}; "
        f"{rounds} rounds, {first['decode_tokens']} decode steps."
    )


def _about(machine: dict) -> str:
    peak = PEAK_MEASURE["cuda" if machine["gpu"] else "cpu"]
    return (
        "Medians [quartiles] over rounds in which all settings take turns. *prefill*: embedding, decoder layers, head "
        "and all that the method computes itself, wherever it does (tower, projector, language model); *vision*: tower "
        "and projector without it; *first token*: both. *method*: its own work, in a prefill of its own whose parts "
        "are timed. *speed-up*: of the prefill, against the unpruned model in the same round. *MAC ratio*: what "
        "counted multiply-adds promise, of the prefill in the same sense; *of the MAC ratio*: how much of it the "
        "speed-up "
        "reaches. *overhead*: prefill / floor in the same round; the floor runs the same layers on the same lengths "
        "with the choice for free. Below 1 is possible: with early drop a pruning layer computes fewer rows than the "
        "floor. *end to end*: vision, prefill and the decode steps. *peak*: "
        f"{peak}; weights and inputs are not in it. *KV*: bytes of the cache's tensors after the prefill, all "
        "layers.\n\n"
        f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}, "
        f"{machine['os']}, code {machine['code']}."
    )


def table_csv(rows: Sequence[dict]) -> str:
    """All rows with numbers as they are, medians and quartiles in columns of their own."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: dict) -> dict:
    out = {}
    for key, value in row.items():
        if key == "parts_ms":
            out |= {f"{name}_ms": part["median"] for name, part in value.items()}
        elif isinstance(value, dict) and "median" in value:
            out |= {key: value["median"], f"{key}_q25": value["q25"], f"{key}_q75": value["q75"]}
        elif key in ("options", "lengths", "kv_bytes"):
            out[key] = json.dumps(value, default=list)
        else:
            out[key] = value
    return out


if __name__ == "__main__":
    main()
