"""Pictures and questions: deterministic, splits apart, answers true of the picture."""

import subprocess
import sys

import numpy as np
import pytest

from sparsevlm.mini import questions
from sparsevlm.mini.scenes import GRID, NO_CLASS, NO_COLOR, NO_OBJECT, PATCH, SceneGenerator, SceneObject, digit_indices
from sparsevlm.mini.vocabulary import CLASSES, COLORS, VOCAB_SIZE, WORD_ID, WORDS

# kind, colour, x, y, size, neighbour, second digit
RECORDED = [
    (4, 3, 76, 9, 15, None, None),
    (5, 4, 76, 47, 15, None, 2),
    (9, 4, 91, 47, 15, None, None),
    (13, 7, 133, 143, 15, None, None),
    (0, 2, 32, 62, 13, None, None),
    (0, 6, 83, 140, 15, None, None),
    (14, 6, 9, 79, 14, None, None),
    (2, 3, 98, 80, 15, None, None),
    (15, 0, 109, 59, 16, 9, None),
    (5, 3, 125, 59, 16, None, None),
    (14, 4, 30, 19, 13, 11, None),
    (3, 6, 43, 19, 13, None, None),
    (11, 7, 37, 111, 16, None, None),
    (5, 0, 41, 145, 14, None, None),
    (10, 2, 135, 119, 16, None, None),
]


# patches of some of them
RECORDED_PATCHES = {
    0: [35, 36, 59, 60],
    3: [499, 500, 523, 524, 547, 548],
    4: [221, 245],
    8: [208, 209, 231, 232, 233, 256, 257],
    9: [210, 211, 234, 235, 258, 259],
    11: [78, 79, 103],
}
# grid -> number of objects for seeds 0, 1, ...
RECORDED_COUNTS = {
    8: [3, 2, 4, 2, 2, 4, 3, 2, 3, 2, 4, 4, 3, 3, 4, 3, 2, 2, 4, 3, 4, 3, 4, 3, 4, 2, 3, 4, 3, 4, 5, 4, 4, 3, 3, 3],
    12: [6, 5, 4, 7, 4, 5, 8, 8, 8, 6, 5, 7, 5, 6, 7, 8, 5, 8, 5, 7, 5, 5, 4, 4, 6, 4, 5, 7, 5, 4, 5, 4, 4, 6, 8, 6],
    24: [15, 19, 19, 18, 20, 13, 22, 18, 17, 13, 14, 19, 23, 19, 21, 14, 21, 17, 20, 13, 11, 13, 10, 10, 19, 16, 11],
}


@pytest.fixture(scope="module")
def generator():
    return SceneGenerator("test")


@pytest.fixture(scope="module")
def scenes(generator):
    rng = np.random.RandomState(0)
    return [generator.draw(rng) for _ in range(40)]


def test_digits_of_the_test_split_are_never_in_the_training_split():
    from sklearn.datasets import load_digits

    images = load_digits().images
    train, test = digit_indices("train"), digit_indices("test")
    assert len(train) == 1437 and len(test) == 360
    assert not set(train) & set(test)
    seen = {images[i].tobytes() for i in train}
    assert not any(images[i].tobytes() in seen for i in test)


def test_a_generator_draws_only_digits_of_its_split(generator):
    """The alpha masks of the two splits have no picture in common, whatever the size."""
    other = SceneGenerator("train")
    for key, masks in generator._sprites.masks.items():
        if key[0] < 10:
            seen = {mask.tobytes() for mask in other._sprites.masks[key]}
            assert not any(mask.tobytes() in seen for mask in masks)


def test_unknown_split_and_small_grid_are_refused(generator):
    with pytest.raises(ValueError, match="unknown split 'val'; use one of train, test"):
        digit_indices("val")
    with pytest.raises(ValueError, match="at least 8"):
        generator.draw(np.random.RandomState(0), grid=7)


@pytest.mark.parametrize("grid", [8, 12, 24])
def test_same_random_state_same_scene(generator, grid):
    first, again, other = (generator.draw(np.random.RandomState(seed), grid) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image) and first.objects == again.objects
    assert first.image.shape == (grid * PATCH, grid * PATCH, 3) and first.image.dtype == np.uint8
    assert not np.array_equal(first.image, other.image)


def test_the_draws_are_those_the_shipped_weights_were_trained_on(generator):
    """Objects as recorded from the generator that the training used (only integers: no rounding to depend on)."""
    scene = generator.draw(np.random.RandomState(0))
    objects = [(o.kind, o.color, o.x, o.y, o.size, o.neighbour, o.second_digit) for o in scene.objects]
    assert objects == RECORDED
    assert {i: scene.patches_of((i,)) for i in RECORDED_PATCHES} == RECORDED_PATCHES
    for grid, counts in RECORDED_COUNTS.items():
        drawn = [len(generator.draw(np.random.RandomState(seed), grid).objects) for seed in range(len(counts))]
        assert drawn == counts


def test_labels_agree_with_each_other_and_with_the_objects(scenes):
    for scene in scenes:
        covered = scene.object_map != NO_OBJECT
        assert np.array_equal(covered, scene.class_map != NO_CLASS)
        assert np.array_equal(covered, scene.color_map != NO_COLOR)
        for index, obj in enumerate(scene.objects):
            patches = scene.patches_of((index,))
            assert 1 <= len(patches) <= 9
            for patch in patches:
                row, column = divmod(patch, GRID)
                assert scene.class_map[row, column] == obj.kind and scene.color_map[row, column] == obj.color
                assert obj.x - PATCH < column * PATCH < obj.x + obj.size
                assert obj.y - PATCH < row * PATCH < obj.y + obj.size


def test_labelled_patches_show_the_colour(scenes):
    """On the patches of red objects the picture is redder than on the background, and so on."""
    red, green, blue = (COLORS.index(name) for name in ("red", "green", "blue"))
    for channel, color in enumerate((red, green, blue)):
        inside, outside = [], []
        for scene in scenes:
            cells = scene.image.reshape(GRID, PATCH, GRID, PATCH, 3).astype(float).mean((1, 3))
            excess = cells[..., channel] - cells.mean(-1)
            inside += excess[scene.color_map == color].tolist()
            outside += excess[scene.color_map == NO_COLOR].tolist()
        assert np.mean(inside) > 20 > abs(np.mean(outside))


def test_objects_do_not_overlap(scenes):
    for scene in scenes:
        ink = np.zeros(scene.image.shape[:2], int)
        for obj in scene.objects:
            ink[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size] += 1
        assert ink.max() == 1


def test_answers_are_true(scenes):
    """Every answer is derived again from the list of objects, by other code."""
    rng = np.random.RandomState(1)
    checked = set()
    for scene in scenes:
        objects = [(CLASSES[o.kind], COLORS[o.color], o) for o in scene.objects]
        for found in questions.candidates(scene.objects, rng).values():
            for question in found:
                assert question.answer == _answer(question, objects), question
                checked.add(question.type)
    assert checked == set(questions.TYPES)


def _answer(question, objects) -> tuple[str, ...]:
    """The answer, or a failure where there is more than one."""
    words = set(question.words)
    named = [name for name in (*CLASSES, *COLORS) if name in words]
    if question.type in ("digit_of_color", "shape_of_color"):
        wants_digit = question.type == "digit_of_color"
        (answer,) = (kind for kind, color, o in objects if color in words and o.is_digit == wants_digit)
        return (answer,)
    if question.type in ("color_of_digit", "color_of_shape"):
        (answer,) = (color for kind, color, _ in objects if kind in words)
        return (answer,)
    if question.type == "exist":
        return ("yes" if any(kind in words and color in words for kind, color, _ in objects) else "no",)
    if question.type == "count":
        (name,) = named
        counted = [o for kind, color, o in objects if name in (kind, color)]
        if "objects" not in words:
            counted = [o for o in counted if o.is_digit == ("digits" in words)]
        return (str(len(counted)),)
    if question.type == "next":
        (digit,) = named
        return (str(int(digit) + (1 if "after" in words else -1)),)
    if question.type == "beside":
        ((_, _, shape),) = ((k, c, o) for k, c, o in objects if k in words and c in words)
        (answer,) = (k for k, _, o in objects if (o.x, o.y) == (shape.x + shape.size, shape.y))
        return (answer,)
    pairs = [
        (left, right)
        for left, color, a in objects
        for right, other, b in objects
        if a.second_digit is not None and color in words and (b.x, b.y, other) == (a.x + a.size, a.y, color)
    ]
    (answer,) = pairs
    return answer


def test_targets_are_the_objects_asked_for(scenes):
    rng = np.random.RandomState(2)
    for scene in scenes:
        for found in questions.candidates(scene.objects, rng).values():
            for question in found:
                for target in question.targets:
                    obj = scene.objects[target]
                    beside_it = question.type == "beside" and target == question.targets[1]
                    names_it = CLASSES[obj.kind] in question.words or COLORS[obj.color] in question.words
                    assert names_it or beside_it


def test_no_unanswerable_question_is_asked():
    """Two red digits: "what digit is red" has two answers."""
    twice = [SceneObject(1, 0, 0, 0, 14), SceneObject(2, 0, 40, 40, 14)]
    found = questions.candidates(twice, np.random.RandomState(0))
    assert found["digit_of_color"] == [] and len(found["color_of_digit"]) == 2
    assert questions.draw([], 3, np.random.RandomState(0)) == []


def test_drawn_questions_use_known_words_and_all_types(scenes):
    rng = np.random.RandomState(3)
    drawn = [question for scene in scenes for question in questions.draw(scene.objects, 8, rng)]
    assert len(drawn) == 8 * len(scenes)
    assert {question.type for question in drawn} == set(questions.TYPES)
    assert all(word in WORD_ID for question in drawn for word in (*question.words, *question.answer))
    assert len(set(WORDS)) == len(WORDS) < VOCAB_SIZE


def test_numbers_of_a_count_are_drawn_evenly():
    """Each number that occurs in the scene is as likely as another: "1" is not the safe answer."""
    scene = [SceneObject(1, 0, 0, 0, 14), SceneObject(2, 0, 40, 40, 14), SceneObject(3, 1, 80, 80, 14)]
    rng = np.random.RandomState(0)
    drawn = [q.answer[0] for _ in range(500) for q in questions.candidates(scene, rng)["count"]]
    assert {"0", "1", "2"} == set(drawn)
    assert all(abs(drawn.count(number) / len(drawn) - 1 / 3) < 0.05 for number in "012")


def test_training_draws_types_by_their_weights(scenes):
    rng = np.random.RandomState(4)
    drawn = [q.type for scene in scenes for q in questions.draw(scene.objects, 100, rng)]
    everywhere = ("exist", "count", "next")  # every scene has questions of these types
    weights = [questions.TRAINING_WEIGHTS.get(name, 1.0) for name in everywhere]
    for name, weight in zip(everywhere, weights, strict=True):
        assert drawn.count(name) / drawn.count("exist") == pytest.approx(weight / weights[0], rel=0.2)


def test_the_language_control_has_one_answer_whatever_the_picture(scenes):
    rng, answers = np.random.RandomState(5), {}
    for scene in [*scenes, *scenes]:
        for question in questions.candidates(scene.objects, rng)["next"]:
            assert question.targets == ()
            assert answers.setdefault(question.text, question.answer) == question.answer
    assert len(answers) == 16  # before and after 1 to 8


def test_importing_the_package_imports_no_scikit_learn():
    code = (
        "import sys, sparsevlm.mini, sparsevlm.mini.scenes, sparsevlm.mini.questions, sparsevlm.mini.vocabulary;"
        "assert not [m for m in ('sklearn', 'datasets', 'pandas') if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
