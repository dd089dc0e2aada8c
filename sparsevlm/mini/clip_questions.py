"""Questions about a clip: what appears, in which order, and what moves where."""

import numpy as np

from sparsevlm.mini.clips import ClipObject
from sparsevlm.mini.questions import Question, draw_by_weight, make_question
from sparsevlm.mini.vocabulary import CLASSES, COLORS

TYPES = ("digit_of_color", "shape_of_color", "exist", "first_or_last", "order", "motion")
#: How often each type is drawn for training, relative to ``digit_of_color``.
TRAINING_WEIGHTS = {"first_or_last": 2.0, "order": 1.5, "motion": 2.0}


def candidates(objects: list[ClipObject], rng: np.random.RandomState) -> dict[str, list[Question]]:
    """All questions about a clip by type (of ``exist`` two drawn ones), in ``TYPES`` order; each has one answer."""
    of_color = {
        name: [
            make_question(name, f"what {noun} is {COLORS[obj.color]} ?", CLASSES[obj.kind], [i])
            for i, obj in enumerate(objects)
            if obj.is_digit == (noun == "digit")
        ]
        for name, noun in (("digit_of_color", "digit"), ("shape_of_color", "shape"))
    }
    return {
        **of_color,
        "exist": [_exist(objects, answer, rng) for answer in ("yes", "no")],
        "first_or_last": _first_or_last(objects),
        "order": _order(objects),
        "motion": [
            make_question("motion", f"where is the {_name(obj)} moving ?", obj.direction, [i])
            for i, obj in enumerate(objects)
            if obj.direction
        ],
    }


def draw(objects: list[ClipObject], count: int, rng: np.random.RandomState) -> list[Question]:
    """``count`` questions: a type drawn by ``TRAINING_WEIGHTS``, then one of the clip's questions of it."""
    return draw_by_weight(candidates(objects, rng), TRAINING_WEIGHTS, count, rng)


def _name(obj: ClipObject) -> str:
    return f"{COLORS[obj.color]} {CLASSES[obj.kind]}"


def _exist(objects, answer: str, rng) -> Question:
    """No: a class and a colour which the clip shows, but not together."""
    there = {(obj.kind, obj.color) for obj in objects}
    kind, color = objects[rng.randint(len(objects))].kind, objects[rng.randint(len(objects))].color
    if answer == "yes":
        kind, color = sorted(there)[rng.randint(len(there))]
    while answer == "no" and (kind, color) in there:
        color = rng.randint(len(COLORS))
    targets = [i for i, obj in enumerate(objects) if obj.kind == kind or obj.color == color]
    if answer == "yes":
        targets = [i for i in targets if (objects[i].kind, objects[i].color) == (kind, color)]
    return make_question("exist", f"is there a {COLORS[color]} {CLASSES[kind]} ?", answer, targets)


def _first_or_last(objects) -> list[Question]:
    """Which of the digits (or shapes) appears first, which last; asked where one alone does."""
    found = []
    for noun in ("digit", "shape"):
        among = [i for i, obj in enumerate(objects) if obj.is_digit == (noun == "digit")]
        starts = sorted(objects[i].start for i in among)
        if len(among) < 2:
            continue
        for word, start, next_start in (("first", starts[0], starts[1]), ("last", starts[-1], starts[-2])):
            if start != next_start:
                (target,) = (i for i in among if objects[i].start == start)
                found.append(
                    make_question("first_or_last", f"what {noun} is {word} ?", CLASSES[objects[target].kind], among)
                )
    return found


def _order(objects) -> list[Question]:
    """Does one object appear before another? Both ways round, so that yes and no are equally frequent."""
    return [
        make_question("order", f"is {_name(a)} before {_name(b)} ?", "yes" if a.start < b.start else "no", [i, j])
        for i, a in enumerate(objects)
        for j, b in enumerate(objects)
        if a.start != b.start
    ]
