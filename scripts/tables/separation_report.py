"""The separation report, Markdown and CSV, from the runs of `experiment=separation`.

`results/reference/separation` holds what an earlier version left, one JSON file per setting; they are read, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from eval.markdown import markdown_table
from eval.runs.reader import Run, read_runs
from eval.runs.reader import label as label_of
from eval.runs.stats import bootstrap_ci, paired_difference
from eval.tasks.minivqa.utils import LANGUAGE_CONTROL


@dataclass(frozen=True)
class Setting:
    """One line of the report: a method or control, its options, its budget (None: the whole picture or none of it)."""

    method: str
    budget: int | None = None
    options: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        extra = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return self.method + (f" ({extra})" if extra else "")


TASK, BLIND = "minivqa", "minivqa_blind"
MATCHED = Setting("random_layer", options={"match": "sparsevlm"})
#: (this, minus that, what the difference says), at equal budgets.
SELF = {"guide": "self"}
CONTRASTS = (
    (Setting("sgl"), Setting("fastv"), "a small model's attention against the large one's own, at the same layers"),
    (Setting("sgl", options=SELF), Setting("sgl"), "the model's own answer and all of its layers as guide (oracle)"),
    (
        Setting("sgl"),
        Setting("sgl", options=SELF | {"layers": 2, "answer_tokens": 0}),
        "a trained guide of two layers against the model's own first two",
    ),
    (Setting("sparsevlm", options={"raters": "all"}), MATCHED, "guided selection against none, at the same cost"),
    (
        Setting("sparsevlm", options={"raters": "all"}),
        Setting("random"),
        "the same against tokens kept from the input on",
    ),
    (
        Setting("sparsevlm", options={"raters": "all"}),
        Setting("saliency"),
        "text as raters against the picture as rater",
    ),
    (
        Setting("sparsevlm", options={"raters": "all"}),
        Setting("fastv"),
        "all words, three layers; last word, one layer",
    ),
    (
        Setting("sparsevlm"),
        Setting("sparsevlm", options={"raters": "all"}),
        "the paper's choice of raters against all words",
    ),
    (Setting("sparsevlm"), MATCHED, "the paper's choice of raters against chance, at the same cost"),
    (Setting("sparsevlm"), Setting("random"), "the same against tokens kept from the input on"),
    (
        Setting("sparsevlm", options={"raters": "all"}),
        Setting("sparsevlm", options={"raters": "all", "recycle": 0}),
        "recycling",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One run. All numbers are of the questions that need the picture; the language control is asked by its type."""

    label: str
    budget: int | None
    content: dict

    @property
    def results(self) -> list[dict]:
        return self.content["results"]

    @cached_property
    def right(self) -> dict[int, float]:
        return {r["id"]: float(r["right"]) for r in self.results if r["type"] not in LANGUAGE_CONTROL}

    @property
    def kept(self) -> float | None:
        """Mean share of the answer's tokens that the first stage keeps; None where it has no meaning."""
        shares = [r["kept"] for r in self.results if "kept" in r]
        return sum(shares) / len(shares) if shares else None

    def accuracy(self, type_: str | None = None) -> float:
        if type_ is None:
            return 100 * sum(self.right.values()) / len(self.right)
        right = [r["right"] for r in self.results if r["type"] == type_]
        return 100 * sum(right) / len(right)


def read(folder: Path) -> list[Outcome]:
    """Read all runs of a folder; they must be of one model and one set of questions.

    Raises:
        ValueError: no runs, or runs that do not belong together; the message names one.
        eval.runs.reader.BadRun: a run folder that cannot be used.
    """
    if (folder / "runs").is_dir():
        runs = [run for run in read_runs(folder) if run.task in (TASK, BLIND)]
        found = [(run.folder, _content(run)) for run in runs]
    else:
        found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    outcomes, identity = [], None
    for path, content in found:
        this = {key: content.get(key) for key in ("model", "weights", "task", "seed", "questions")}
        if identity not in (None, this):
            raise ValueError(f"{path} is of {this}, others of {folder} are of {identity}. Keep them apart")
        identity = this
        if "refused" not in content and len(content["results"]) != content["questions"]:
            raise ValueError(f"{path} holds {len(content['results'])} of {content['questions']} questions. Remove it")
        setting = Setting(**content["setting"])
        outcomes.append(Outcome(setting.label, setting.budget, content))
    if not outcomes:
        raise ValueError(
            f"no results in {folder}. Make them with python -m eval.run experiment=separation results_dir={folder}"
        )
    return outcomes


def _content(run: Run) -> dict:
    """Return a run in the form of the files: identity, setting, and the results of the questions."""
    m = run.metrics
    name = label_of(m["method"], m["options"])
    setting = {"method": "blind"} if run.task == BLIND else {"method": name}
    if m["method"] != "none":
        setting["budget"] = m["budget"]
    results = [
        {
            "id": sample["doc_id"],
            "type": sample["question_type"],
            "right": bool(sample["scores"]["accuracy"]),
            **({"kept": sample["target_kept"]} if "target_kept" in sample else {}),
            **({"raters": sample["raters"]} if "raters" in sample else {}),
        }
        for sample in run.samples
    ]
    about = {"model": run.model, "weights": m.get("weights"), "task": TASK, "seed": m["seed"], "questions": m["n"]}
    return about | {"setting": setting, "results": results}


def write(folder: Path) -> list[Path]:
    """Write `separation.md` and `separation.csv` into a folder of results; return their paths."""
    outcomes = read(folder)
    by_key = {(o.label, o.budget): o for o in outcomes if o.results}
    budgets = sorted({o.budget for o in outcomes if o.budget}, reverse=True)
    labels = list(dict.fromkeys(o.label for o in sorted(outcomes, key=lambda o: o.label) if o.budget))
    types = list(dict.fromkeys(r["type"] for r in outcomes[0].results)) or list(
        dict.fromkeys(r["type"] for o in by_key.values() for r in o.results)
    )
    head = outcomes[0].content
    parts = [
        f"# Separation on `{head['model']}`",
        f"Accuracy in percent on the first {head['questions']} questions of `{head['task']}`, seed {head['seed']}, "
        f"float32, greedy; weights {head['weights']}. {control_text(by_key.values())}"
        "In brackets 95 % intervals (bootstrap over questions), behind "
        "the bar the share of the answer's tokens that the first stage keeps (where tokens are patches). The budget "
        "is the mean number of visual tokens per layer. `python scripts/make_separation.py` makes this table.",
        _overall(by_key, labels, budgets),
        "## Differences, in points, paired over questions",
        _contrasts(by_key, budgets),
        *(
            part
            for b in (64, 16)
            if b in budgets
            for part in (f"## By type of question, {b} tokens", _by_type(by_key, labels, types, b))
        ),
        "## Which words rate, in SparseVLM by the paper's rule",
        rater_words(by_key, budgets),
        _refusals(outcomes),
    ]
    text = folder / "separation.md"
    text.write_text("\n\n".join(part for part in parts if part) + "\n")
    frame = pd.DataFrame(
        {
            "method": o.label,
            "budget": o.budget or "full",
            "accuracy": o.accuracy(),
            **dict(
                zip(
                    ("accuracy_low", "accuracy_high"),
                    (100 * v for v in bootstrap_ci(list(o.right.values()))[1:]),
                    strict=True,
                )
            ),
            "kept": o.kept,
            **{f"accuracy_{name}": o.accuracy(name) for name in types},
        }
        for o in by_key.values()
    )
    data = folder / "separation.csv"
    frame.round(3).to_csv(data, index=False)
    return [text, data]


def control_text(outcomes: Iterable[Outcome]) -> str:
    """What is said of the language control, which no number but its own column contains."""
    found = []
    for outcome in outcomes:
        right = [r["right"] for r in outcome.results if r["type"] in LANGUAGE_CONTROL]
        found += [(len(right), 100 * sum(right) / len(right))] if right else []
    if not found:
        return ""
    low, high = (f"{pick(share for _, share in found):.0f}" for pick in (min, max))
    return (
        f"All but the columns of types leave the language control out (`{'`, `'.join(LANGUAGE_CONTROL)}`, "
        f"{found[0][0]} questions that need no picture; {low if low == high else f'{low} to {high}'} % everywhere). "
    )


def _overall(by_key, labels, budgets) -> str:
    lines = []
    for control in ("none", "blind"):
        if outcome := by_key.get((control, None)):
            lines.append([f"**{control}**: {cell(outcome)}", *[""] * len(budgets)])
    for label in labels:
        cells = [by_key.get((label, budget)) for budget in budgets]
        lines.append([label, *("refused" if c is None else cell(c) for c in cells)])
    return markdown_table(["method", *budgets], lines)


def cell(outcome: Outcome) -> str:
    """Accuracy in percent with its interval and, behind a bar, the share of the answer's tokens kept."""
    mean, low, high = (100 * v for v in bootstrap_ci(list(outcome.right.values())))
    share = "" if outcome.kept is None else f" | {100 * outcome.kept:.0f} %"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]{share}"


def difference(this: Outcome | None, that: Outcome | None) -> str:
    """This minus that in points, with the interval, paired over questions."""
    if this is None or that is None:
        return "not run"
    mean, low, high = (100 * v for v in paired_difference(this.right, that.right))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _contrasts(by_key, budgets) -> str:
    lines = []
    pairs = [
        (None, Setting("random"), "what pruning at random costs"),
        (None, Setting("oracle"), "what knowing the place leaves to lose"),
    ]
    for this, that, meaning in (*pairs, *CONTRASTS):
        cells = []
        for budget in budgets:
            a = by_key.get(("none", None) if this is None else (this.label, budget))
            b = by_key.get((that.label, budget))
            cells.append(difference(a, b))
        lines.append([f"{this.label if this else 'none'} - {that.label}", *cells, meaning])
    return markdown_table(["difference", *budgets, "what it says"], lines, left=(0, len(budgets) + 1))


def _by_type(by_key, labels, types, budget) -> str:
    lines = []
    for key in (("none", None), ("blind", None), *((label, budget) for label in labels)):
        if outcome := by_key.get(key):
            lines.append([key[0], *(f"{outcome.accuracy(name):.0f}" for name in types)])
    return markdown_table(["method", *types], lines)


def rater_words(by_key, budgets) -> str:
    """In which share of the questions a word rates, by the paper's rule; at the first of the budgets that was run."""
    for budget in budgets:
        if outcome := by_key.get(("sparsevlm", budget)):
            words = Counter(word for r in outcome.results for word in r.get("raters", ()))
            total = len(outcome.results)
            named = ", ".join(f"`{word}` {100 * count / total:.0f} %" for word, count in words.most_common(12))
            return f"Share of the questions in which a word becomes a rater: {named}."
    return "not run"


def _refusals(outcomes) -> str:
    lines = [f"- {o.label} at {o.budget}: {o.content['refused']}" for o in outcomes if "refused" in o.content]
    return "## Refused\n\n" + "\n".join(lines) if lines else ""
