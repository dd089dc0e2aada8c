"""Questions about a scene, of nine types, each with its answer and the objects one has to look at.

A question is asked only where it has one answer (of a colour or class that occurs once among the candidates). None can
be answered from the picture alone or, but for ``next``, from the text alone; ``next`` is the control: it needs no
picture.
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
    "next",
)
#: How often each type is drawn for training, relative to 1; a test draws all types equally often. What takes more
#: looking (and was learnt last) is asked more often than what is learnt within minutes.
TRAINING_WEIGHTS = {
    "color_of_digit": 0.5,
    "color_of_shape": 0.5,
    "count": 5.0,
    "beside": 2.0,
    "read": 1.5,
    "next": 0.5,
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        type: one of ``TYPES``.
        words: the question as the model's words, e.g. ``("what", "digit", "is", "red", "?")``.
        answer: the answer's words; two for ``read``, else one.
        targets: indices of the objects that decide the answer; for ``exist`` answered with no, those that share the
            colour or the class asked for; empty for a count of zero and for ``next``.
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
        "next": _next(rng),
    }
    return {name: found[name] for name in TYPES}


def draw(objects: list[SceneObject], count: int, rng: np.random.RandomState) -> list[Question]:
    """``count`` questions about a scene: a type drawn by ``TRAINING_WEIGHTS``, then one of the scene's questions of it.

    The same question may be drawn twice. A scene without objects has no questions: the list is then empty.
    """
    if not objects:
        return []
    return draw_by_weight(candidates(objects, rng), TRAINING_WEIGHTS, count, rng)


def draw_by_weight(
    found: dict[str, list[Question]], weights: dict[str, float], count: int, rng: np.random.RandomState
) -> list[Question]:
    """``count`` of the questions found: a type that has any by its weight (1 if not named), then one of that type."""
    pools = {name: pool for name, pool in found.items() if pool}
    shares = np.array([weights.get(name, 1.0) for name in pools])
    types = rng.choice(list(pools), count, p=shares / shares.sum())
    return [pools[name][rng.randint(len(pools[name]))] for name in types]


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
    """How many digits or shapes of a colour: each number that occurs is as likely as another.

    Otherwise "1" would be right most of the time, and a model could live on guessing it. (Versions 1 and 2 of the task
    counted objects of a class, too: the model never learnt that well enough for a loss to mean something.)
    """
    if not objects:
        return []
    by_number: dict[int, list[Question]] = {}
    for asked, targets in _groups(objects).items():
        if len(targets) < len(DIGITS):
            question = make_question("count", f"how many {asked} ?", DIGITS[len(targets)], targets)
            by_number.setdefault(len(targets), []).append(question)
    pools = [by_number[number] for number in sorted(by_number)]
    found = []
    for _ in range(4):
        pool = pools[rng.randint(len(pools))]
        found.append(pool[rng.randint(len(pool))])
    return found


def _groups(objects) -> dict[str, list[int]]:
    """What can be counted, each with the objects that belong to it (of what is not there, none)."""
    groups: dict[str, list[int]] = {f"{color} {noun}": [] for color in COLORS for noun in ("digits", "shapes")}
    for i, obj in enumerate(objects):
        groups[f"{COLORS[obj.color]} {'digits' if obj.is_digit else 'shapes'}"].append(i)
    return groups


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


def _next(rng) -> list[Question]:
    """The digit before or after one: as easy without the picture."""
    digit = rng.randint(1, len(DIGITS) - 1)
    after = rng.rand() < 0.5
    text = f"what digit is {'after' if after else 'before'} {DIGITS[digit]} ?"
    return [make_question("next", text, DIGITS[digit + 1 if after else digit - 1], [])]
