"""Questions about a scene, of eight types, each with its answer and the objects one has to look at.

A question is asked only where it has one answer (of a colour or class that occurs once among the candidates), and
none can be answered from the picture or from the text alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sparsevlm.mini.scenes import SceneObject
from sparsevlm.mini.vocabulary import CLASSES, COLORS, DIGITS

TYPES = (
    "digit_of_color",
    "color_of_digit",
    "shape_of_color",
    "color_of_shape",
    "exist",
    "count",
    "beside",
    "read",
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        type: one of ``TYPES``.
        words: the question as the model's words, e.g. ``("what", "digit", "is", "red", "?")``.
        answer: the answer's words; two for ``read``, else one.
        targets: indices of the objects that decide the answer; for ``exist`` answered with no, those that share the
            colour or the class asked for; empty for a count of zero.
    """

    type: str
    words: tuple[str, ...]
    answer: tuple[str, ...]
    targets: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def answer_text(self) -> str:
        """The answer as people write it: the digits of a number without a space."""
        return "".join(self.answer)


def candidates(objects: list[SceneObject], rng: np.random.RandomState) -> dict[str, list[Question]]:
    """All questions of the look-up types and a few drawn ones of ``exist`` and ``count``, by type, in ``TYPES`` order.

    A type for which the scene holds no question has an empty list.
    """
    digits = [i for i, obj in enumerate(objects) if obj.is_digit]
    shapes = [i for i, obj in enumerate(objects) if not obj.is_digit]
    found = {
        "digit_of_color": [
            make_question("digit_of_color", f"what digit is {COLORS[color]} ?", CLASSES[objects[i].kind], [i])
            for color, i in _unique((objects[i].color, i) for i in digits)
        ],
        "color_of_digit": [
            make_question("color_of_digit", f"what color is the {CLASSES[kind]} ?", COLORS[objects[i].color], [i])
            for kind, i in _unique((objects[i].kind, i) for i in digits)
        ],
        "shape_of_color": [
            make_question("shape_of_color", f"what shape is {COLORS[color]} ?", CLASSES[objects[i].kind], [i])
            for color, i in _unique((objects[i].color, i) for i in shapes)
        ],
        "color_of_shape": [
            make_question("color_of_shape", f"what color is the {CLASSES[kind]} ?", COLORS[objects[i].color], [i])
            for kind, i in _unique((objects[i].kind, i) for i in shapes)
        ],
        "exist": _exist(objects, rng),
        "count": _count(objects, rng),
        "beside": _beside(objects),
        "read": _read(objects),
    }
    return {name: found[name] for name in TYPES}


def draw(objects: list[SceneObject], count: int, rng: np.random.RandomState) -> list[Question]:
    """``count`` questions about a scene: a uniformly drawn type (of those it can answer), then one of its questions.

    The same question may be drawn twice. A scene without objects has no questions: the list is then empty.
    """
    pools = [pool for pool in candidates(objects, rng).values() if pool]
    drawn = []
    while pools and len(drawn) < count:
        pool = pools[rng.randint(len(pools))]
        drawn.append(pool[rng.randint(len(pool))])
    return drawn


def make_question(type_: str, text: str, answer: str, targets: list[int]) -> Question:
    """A question from its text and its answer, words separated by spaces."""
    return Question(type_, tuple(text.split()), tuple(answer.split()), tuple(targets))


def _unique(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The (key, index) pairs whose key occurs once."""
    by_key: dict[int, list[int]] = {}
    for key, index in pairs:
        by_key.setdefault(key, []).append(index)
    return [(key, indices[0]) for key, indices in by_key.items() if len(indices) == 1]


def _exist(objects, rng) -> list[Question]:
    """Yes: an object that is there. No: mostly a colour and a class that are both there, but not together."""
    if not objects:
        return []
    present = {(obj.kind, obj.color) for obj in objects}
    found = []
    for _ in range(4):
        answer = "yes" if rng.rand() < 0.5 else "no"
        i = rng.randint(len(objects))
        kind, color = objects[i].kind, objects[i].color
        if answer == "yes":
            targets = [q for q, obj in enumerate(objects) if (obj.kind, obj.color) == (kind, color)]
        else:
            j = rng.randint(len(objects))
            if rng.rand() < 0.7:
                kind, color = objects[i].kind, objects[j].color
            else:
                kind, color = rng.randint(len(CLASSES)), rng.randint(len(COLORS))
            if (kind, color) in present:
                kind, color = objects[i].kind, rng.randint(len(COLORS))
            if (kind, color) in present:
                continue
            targets = [q for q, obj in enumerate(objects) if obj.kind == kind or obj.color == color]
        found.append(make_question("exist", f"is there a {COLORS[color]} {CLASSES[kind]} ?", answer, targets))
    return found


def _count(objects, rng) -> list[Question]:
    if not objects:
        return []
    found = []
    for _ in range(3):
        by_color = rng.rand() < 0.5
        of_one_present = rng.rand() < 0.75
        if by_color:
            color = objects[rng.randint(len(objects))].color if of_one_present else rng.randint(len(COLORS))
            name, targets = COLORS[color], [q for q, obj in enumerate(objects) if obj.color == color]
        else:
            kind = objects[rng.randint(len(objects))].kind if of_one_present else rng.randint(len(CLASSES))
            name, targets = CLASSES[kind], [q for q, obj in enumerate(objects) if obj.kind == kind]
        if len(targets) < len(DIGITS):
            found.append(make_question("count", f"how many {name} objects ?", DIGITS[len(targets)], targets))
    return found


def _beside(objects) -> list[Question]:
    """The digit at the right side of a shape that occurs once."""
    found = []
    for i, obj in enumerate(objects):
        same = sum((other.kind, other.color) == (obj.kind, obj.color) for other in objects)
        if obj.neighbour is not None and same == 1:
            text = f"what digit is beside the {COLORS[obj.color]} {CLASSES[obj.kind]} ?"
            found.append(make_question("beside", text, CLASSES[objects[obj.neighbour].kind], [i, obj.neighbour]))
    return found


def _read(objects) -> list[Question]:
    """A two-digit number of a colour that no other number has."""
    found = []
    for i, obj in enumerate(objects):
        same = sum(other.second_digit is not None and other.color == obj.color for other in objects)
        if obj.second_digit is not None and same == 1:
            answer = f"{CLASSES[obj.kind]} {CLASSES[objects[obj.second_digit].kind]}"
            found.append(make_question("read", f"read the {COLORS[obj.color]} number ?", answer, [i, obj.second_digit]))
    return found
