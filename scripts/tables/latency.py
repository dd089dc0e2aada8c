"""Tables of a latency run: each setting beside the unpruned model and its floor, and where pruning spends its time."""

from __future__ import annotations

from collections.abc import Sequence

from eval.runs.reader import Run, label
from scripts.tables.formats import NOT_RUN, NOTHING, Table, cell
from scripts.tables.summary import embedded, place
from sparsevlm.runtime.parts import PARTS

_LEGEND = (
    "Medians [quartiles] over rounds in which all settings take turns. prefill: embedding, decoder layers, head and "
    "all that the method computes itself, wherever it does (tower, projector, language model); vision: tower and "
    "projector without it; first token: both. method: its own work, in a prefill of its own whose parts are timed. "
    "speed-up: of the prefill, against the unpruned model in the same round. MAC ratio: the theoretical speed-up, by "
    "counted multiply-adds of the prefill. overhead: prefill / floor in the same round; the floor runs the same layers "
    "on the same lengths with the choice for free, and early drop computes fewer rows than it. end to end: vision, "
    "prefill and the decode steps. peak: memory of a prefill beside weights and inputs; KV: that of the cache after it."
)


def latency_tables(run: Run) -> list[Table]:
    """Make the tables of one run: the settings, and the parts of pruning where they were timed."""
    rows = sorted(run.metrics["rows"], key=lambda r: place(label(r["method"], r["options"]), r["budget"]))
    full = next((r for r in rows if r["method"] == "none"), None)
    found = [_cells(row, full, run) for row in rows]
    title = f"Latency: {run.model}"
    caption = " ".join(
        filter(None, [f"{title}, {conditions(run)}.", embedded(run.model).strip(), _LEGEND, _verdict(rows, full)])
    )
    texts = [[cell(text, run.folder.name) for text in row.values()] for row in found]
    tables = [Table(run.folder.name, title, caption, list(found[0]), texts)]
    pruned = [row for row in rows if row.get("parts_ms")]
    if pruned:
        names = part_names(pruned)
        texts = [
            [cell(text, run.folder.name) for text in (*name_of(row), *(_ms(row, name) for name in names))]
            for row in pruned
        ]
        about = f"Where pruning spends its time on {run.model}, in ms of one prefill: {conditions(run)}. Medians."
        tables.append(Table(f"{run.folder.name}__parts", f"Parts of pruning: {run.model}", about,
                            ["method", "budget", *names], texts))  # fmt: skip
    return tables


def name_of(row: dict) -> tuple[str, str]:
    """Return method with options and budget, as they are printed."""
    return label(row["method"], row["options"]), str(row["budget"])


def part_names(rows: Sequence[dict]) -> list[str]:
    """Return the parts in which any of the settings spent time, in the order in which they happen."""
    found = {name for row in rows for name in row.get("parts_ms", {})}
    return [name for name in PARTS if name in found] + sorted(found - set(PARTS))


def speedup(row: dict) -> dict[str, float] | None:
    """Return how often faster than the unpruned model's the prefill is, with quartiles."""
    ratio = row.get("prefill_ratio")
    return ratio and {"median": 1 / ratio["median"], "q25": 1 / ratio["q75"], "q75": 1 / ratio["q25"]}


def gmacs_ratio(row: dict, full: dict | None) -> float | None:
    """Return the speed-up that counted multiply-adds promise."""
    return full["gmacs"] / row["gmacs"] if full and full.get("gmacs") and row.get("gmacs") else None


def _cells(row: dict, full: dict | None, run: Run) -> dict[str, str]:
    method, budget = name_of(row)
    start = {"method": method, "budget": budget}
    fast, macs = speedup(row), gmacs_ratio(row, full)
    values = {
        "entering": _number(row.get("entering"), 1),
        "leaving": _number(row.get("leaving"), 1),
        "prefill ms": _spread(row.get("prefill_ms"), 1),
        "speed-up": _spread(fast, 2),
        "MAC ratio": NOTHING if macs is None else f"{macs:.2f}",
        "of the MAC ratio %": NOTHING if macs is None or fast is None else f"{100 * fast['median'] / macs:.0f}",
        "overhead": _spread(row.get("overhead"), 3),
        "overhead, CPU time": NOTHING if run.config["device"] != "cpu" else _spread(row.get("overhead_cpu"), 3),
        "of it method ms": _spread(row.get("method_ms"), 2),
        "of it guide ms": _spread(row["guide_ms"], 2) if row.get("guide_ms", {}).get("median") else NOTHING,
        "vision ms": _spread(row.get("vision_ms"), 1),
        "first token ms": _spread(row.get("first_token_ms"), 1),
        "decode ms/token": _spread(row.get("decode_ms"), 2),
        "end to end ms": _spread(row.get("end_to_end_ms"), 1),
        "peak MB": _number(row.get("peak_mb"), 1),
        "KV MB": _number(row.get("kv_mb"), 1),
    }
    return start | (dict.fromkeys(values, row["failed"]) if row.get("failed") else values)


def _number(value: float | None, digits: int) -> str:
    return NOT_RUN if value is None else f"{value:.{digits}f}"


def _spread(value: dict | None, digits: int) -> str:
    if value is None:
        return NOTHING
    return f"{value['median']:.{digits}f} [{value['q25']:.{digits}f}, {value['q75']:.{digits}f}]"


def _ms(row: dict, part: str) -> str:
    return f"{row['parts_ms'].get(part, {'median': 0.0})['median']:.2f}"


def _verdict(rows: Sequence[dict], full: dict | None) -> str:
    """Name the settings that are slower than the unpruned model, or reach less than 90 % of the MAC ratio."""
    compared = [row for row in rows if row["method"] != "none" and speedup(row)]
    if not compared:
        return ""
    slower = [row for row in compared if speedup(row)["median"] < 1]
    counted = [(row, gmacs_ratio(row, full)) for row in compared]
    short = [row for row, ratio in counted if ratio and speedup(row)["median"] < 0.9 * ratio]
    found = []
    for what, which in (("Slower than the unpruned model", slower), ("Below 90 % of the MAC ratio", short)):
        names = ", ".join(" ".join(name_of(row)) for row in which)
        found.append(f"{what}: {names or 'none'}, of {len(compared)} settings.")
    return " ".join(found)


def conditions(run: Run, note: str = "") -> str:
    """Say how and on what a latency run was measured; `note` stands behind the prompt."""
    row, hardware, config = run.metrics["rows"][0], run.metrics["hardware"], run.config
    threads = "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
    on_gpu = config["device"].startswith("cuda")
    device = ", ".join(hardware["gpu"]) if on_gpu else f"{hardware['cpu']}, {threads}"
    tokens = f"{config['prompt']} tokens" if "prompt" in config else f"{row['text_tokens']} text tokens"
    precision = ", ".join(config[key] for key in ("dtype", "attention") if key in config)
    rounds = f"{run.metrics['n']} interleaved rounds at batch {row['batch_size']}"
    return f"{rounds} and {tokens}{note}, {precision} on {device}"
