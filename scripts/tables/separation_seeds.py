"""Does what the separation report says of one training of the model hold for others? Their reports in one table."""

from __future__ import annotations

from pathlib import Path

from eval.markdown import markdown_table
from scripts.tables.separation_report import Outcome, Setting, cell, control_text, difference, rater_words, read

PAPER, ALL = Setting("sparsevlm"), Setting("sparsevlm", options={"raters": "all"})
CENTRED, PICTURE, CHANCE = Setting("sparsevlm", options={"raters": "centred"}), Setting("saliency"), Setting("random")
_SAME = ("task", "seed", "questions")

Outcomes = dict[tuple[str, int | None], Outcome]


def read_all(folders: list[tuple[str, Path]]) -> dict[str, Outcomes]:
    """What was measured of each training, by its name.

    Args:
        folders: names, and folders with the runs of each.

    Raises:
        ValueError: two reports are of the same weights, or of different questions.
    """
    found: dict[str, Outcomes] = {}
    weights: dict[str, Path] = {}
    asked = None
    for name, folder in folders:
        outcomes = read(folder)
        head = outcomes[0].content
        this = {key: head[key] for key in _SAME}
        if asked not in (None, this):
            raise ValueError(f"{folder} is of {this}, {folders[0][1]} of {asked}: ask all trainings the same questions")
        asked = this
        if head["weights"] in weights:
            raise ValueError(f"{folder} and {weights[head['weights']]} are of the same weights")
        weights[head["weights"]] = folder
        found[name] = {(o.label, o.budget): o for o in outcomes if o.results}
    if len(found) < len(folders):
        names = ", ".join(name for name, _ in folders)
        raise ValueError(f"the trainings need different names (name=folder), got {names}")
    return found


def report(trainings: dict[str, Outcomes]) -> str:
    """The Markdown."""
    head = next(iter(next(iter(trainings.values())).values())).content
    each = [{budget for _, budget in outcomes if budget} for outcomes in trainings.values()]
    budgets = sorted(set.intersection(*each), reverse=True)
    parts = [
        "# Trainings compared",
        f"Accuracy in percent on the first {head['questions']} questions of `{head['task']}`, seed {head['seed']}, "
        f"float32, greedy. {control_text(o for outcomes in trainings.values() for o in outcomes.values())}"
        "In brackets 95 % intervals (bootstrap over questions; differences, in points, are paired), "
        "behind the bar the share of the answer's tokens that the first stage keeps. "
        "`python scripts/make_separation.py` makes this file.",
        _trainings(trainings),
        *(part for b in budgets for part in (f"## {b} tokens", _accuracy(trainings, b), _differences(trainings, b))),
        "## Which words rate, in SparseVLM by the paper's rule",
        *(f"- {name}: {rater_words(outcomes, budgets)}" for name, outcomes in trainings.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _trainings(trainings) -> str:
    lines = []
    for name, outcomes in trainings.items():
        whole, blind = outcomes["none", None], outcomes["blind", None]
        lines.append([name, whole.content["weights"], cell(whole), cell(blind)])
    return markdown_table(["training", "weights", "unpruned", "blind"], lines, left=2)


def _accuracy(trainings, budget: int) -> str:
    chosen = {
        "random": CHANCE,
        "paper's raters": PAPER,
        "centred": CENTRED,
        "all words": ALL,
        "the picture as rater": PICTURE,
    }
    lines = []
    for name, outcomes in trainings.items():
        found = [outcomes.get((setting.label, budget)) for setting in chosen.values()]
        lines.append([name, *("not run" if outcome is None else cell(outcome) for outcome in found)])
    return markdown_table(["training", *chosen], lines)


def _differences(trainings, budget: int) -> str:
    pairs = {
        "paper's raters - random": (PAPER, CHANCE),
        "paper's raters - all words": (PAPER, ALL),
        "centred - all words": (CENTRED, ALL),
        "all words - the picture": (ALL, PICTURE),
    }
    lines = []
    for name, outcomes in trainings.items():
        found = [(outcomes.get((a.label, budget)), outcomes.get((b.label, budget))) for a, b in pairs.values()]
        lines.append([name, *(difference(a, b) for a, b in found)])
    return markdown_table(["training", *pairs], lines)


def write(folders: list[tuple[str, Path]], out: Path) -> Path:
    """Write `seeds.md` into a folder, from names and folders of the trainings; return its path.

    Raises:
        ValueError: see :func:`read_all`.
    """
    text = report(read_all(folders))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "seeds.md"
    path.write_text(text)
    return path
