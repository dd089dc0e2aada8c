"""Does the embedded benchmark tell methods apart? Accuracy per type of question, and differences to the controls."""

from __future__ import annotations

from eval.runs.reader import Group, Run, label
from eval.tasks.minivqa.utils import LANGUAGE_CONTROL, VISUAL
from scripts.tables.ablations import interval
from scripts.tables.formats import NOT_RUN, NOTHING, Cell, Table, cell
from scripts.tables.summary import MATCHED, UNPRUNED, difference, embedded, kept_apart, metric_of, place, shown

CONTROLS = ("random", MATCHED, "random_layer", "downsample")
SIGNIFICANT = "*"


def separation_table(group: Group, metric: str | None = None) -> Table | None:
    """The table of a group, or None without types of questions or without any control.

    One row per method and budget; differences to a control are those at the same budget.
    """
    name, percent = metric_of(group, metric)
    base = "accuracy" if name == VISUAL else name
    types = [k.split("/", 1)[1] for k in group.runs[0].metrics["metrics"] if k.startswith(f"{base}/")]
    have = {label(r.metrics["method"], r.metrics["options"]) for r in group.runs}
    controls = [c for c in CONTROLS if c in have]
    if not types or not controls:
        return None
    by_setting = {(label(r.metrics["method"], r.metrics["options"]), r.metrics["budget"]): r for r in group.runs}
    scale = 100.0 if percent else 1.0
    rows = []
    for (method, budget), run in sorted(by_setting.items(), key=lambda item: place(*item[0])):
        found = run.metrics["metrics"]
        low, high = found[name]["ci95"] or (float("nan"),) * 2
        overall = {"value": scale * found[name]["value"], "low": scale * low, "high": scale * high}
        row = [cell(method), cell(str(budget)), cell(interval(overall), run.folder.name)]
        for kind in types:
            typed = found.get(f"{base}/{kind}")
            row.append(cell(NOT_RUN if typed is None else f"{scale * typed['value']:.1f}", run.folder.name))
        others = [by_setting.get((c, budget)) for c in controls]
        row += [_against(run, other, name, scale) for other in [group.unpruned, *others]]
        rows.append(row)
    n = {len(run.samples) // len(types) for run in group.runs}
    caption = (
        f"What separates the methods: {group.task} on the model {group.model}, {group.n} questions (about "
        f"{max(n)} per type), seed {group.seed}. {embedded(group.model)}{kept_apart(group, name)}{shown(name)}"
        f"{' in %' if percent else ''} with 95 % bootstrap interval, the same per type of question, and paired "
        "differences with 95 % bootstrap interval to the unpruned model and to the controls at the same budget: "
        f"{', '.join(controls)}. {SIGNIFICANT}: the interval does not contain 0. No correction for many comparisons."
    )
    names = [f"{kind} (language control)" if kind in LANGUAGE_CONTROL else kind for kind in types]
    columns = ["method", "budget", f"{shown(name)}{' %' if percent else ''}", *names, "to unpruned"]
    columns += [f"to {control}" for control in controls]
    title = f"Separation of methods: {group.task}, {group.model}, {group.n} questions"
    return Table(f"separation__{group.name}", title, caption, columns, rows)


def _against(run: Run, other: Run | None, metric: str, scale: float) -> Cell:
    if run.metrics["method"] == UNPRUNED and other is not run:
        return cell(NOTHING)
    if other is None:
        return cell(NOT_RUN)
    if other is run:
        return cell("0")
    mean = scale * (run.metrics["metrics"][metric]["value"] - other.metrics["metrics"][metric]["value"])
    low, high = (scale * x for x in difference(run, other, metric)[1:])
    mark = SIGNIFICANT if low > 0 or high < 0 else ""
    return cell(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{mark}", run.folder.name, other.folder.name)
