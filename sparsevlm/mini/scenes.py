"""Pictures for the embedded model: handwritten digits and drawn shapes in eight colours over a cluttered background.

A picture is a square grid of 7 x 7 pixel patches (24 x 24 patches = 168 x 168 pixels by default), each of which
becomes one visual token. The digits are the 8 x 8 images of scikit-learn's ``load_digits`` (UCI "Optical Recognition
of Handwritten Digits"), split 80/20 by image: a digit drawn in a test picture was never seen in training.

The order of the random draws is part of the distribution which the shipped weights were trained on: keep it.
"""

from dataclasses import dataclass, replace

import numpy as np

from sparsevlm.mini.vocabulary import CLASSES, COLORS, DIGITS, SHAPES

PATCH = 7
GRID = 24
SPLITS = ("train", "test")
#: Labels of a patch which no object covers.
NO_CLASS, NO_COLOR, NO_OBJECT = len(CLASSES), len(COLORS), -1

_RGB = np.array(
    [
        [220, 40, 40],
        [40, 190, 60],
        [60, 90, 240],
        [235, 220, 50],
        [50, 210, 220],
        [215, 60, 215],
        [240, 240, 240],
        [245, 145, 30],
    ],
    np.float32,
)
SIZES = (13, 14, 15, 16)
_SPLIT_SEED = 123
_TRAIN_SHARE = 0.8
_MIN_COVER = 0.28  # share of a patch that an object's box must cover for the patch to count as its
_MARGIN = 3  # pixels kept free around an object


@dataclass(frozen=True)
class SceneObject:
    """One digit or shape.

    Attributes:
        kind: index into ``CLASSES`` (0-9 digits, 10-15 shapes).
        color: index into ``COLORS``.
        x, y, size: left, top and side of its box in pixels.
        neighbour: for a shape drawn with a digit at its right side, the index of that digit.
        second_digit: for the first digit of a two-digit number, the index of the second.
    """

    kind: int
    color: int
    x: int
    y: int
    size: int
    neighbour: int | None = None
    second_digit: int | None = None

    @property
    def is_digit(self) -> bool:
        return self.kind < len(DIGITS)


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: uint8 ``[pixels, pixels, 3]``.
        objects: in the order in which they were drawn.
        class_map, color_map, object_map: int ``[grid, grid]``, per patch the class, the colour and the index of the
            object that covers most of it; ``NO_CLASS``, ``NO_COLOR`` and ``NO_OBJECT`` on the background.
    """

    image: np.ndarray
    objects: list[SceneObject]
    class_map: np.ndarray
    color_map: np.ndarray
    object_map: np.ndarray

    def patches_of(self, objects: tuple[int, ...]) -> list[int]:
        """Row-major indices of the patches that the given objects (indices) cover, ascending."""
        return np.flatnonzero(np.isin(self.object_map, objects)).tolist()


def digit_indices(split: str) -> np.ndarray:
    """Indices into scikit-learn's 1,797 digit images that belong to a split; the two splits are disjoint.

    Raises:
        ValueError: ``split`` is neither ``"train"`` nor ``"test"``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    count = len(_load_digits().images)
    order = np.random.RandomState(_SPLIT_SEED).permutation(count)
    cut = int(_TRAIN_SHARE * count)
    return order[:cut] if split == "train" else order[cut:]


@dataclass(frozen=True)
class Sprite:
    """A digit or shape to be painted: ``alpha`` float32 ``[size, size, 1]`` in 0..1, ``paint`` its RGB colour."""

    alpha: np.ndarray
    paint: np.ndarray

    def paint_on(self, image: np.ndarray, x: int, y: int) -> None:
        """Blends it into a float picture with its left upper corner at ``(x, y)``."""
        size = len(self.alpha)
        box = np.s_[y : y + size, x : x + size]
        image[box] = image[box] * (1 - self.alpha) + self.paint * self.alpha


class SpriteSet:
    """The digits of one split, and the shapes, in all sizes."""

    def __init__(self, split: str):
        indices = digit_indices(split)
        digits = _load_digits()
        by_kind: list[list[np.ndarray]] = [[] for _ in DIGITS]
        for i in indices:
            by_kind[digits.target[i]].append(np.clip(digits.images[i] / 16 * 1.15, 0, 1).astype(np.float32))
        #: (class, size) -> [number of variants, size, size]
        self.masks = {
            (kind, size): np.stack([_resize(image, size) for image in images])
            for kind, images in enumerate(by_kind)
            for size in SIZES
        }
        for i, name in enumerate(SHAPES):
            for size in SIZES:
                self.masks[len(DIGITS) + i, size] = _shape_mask(name, size)[None]

    def draw(self, kind: int, size: int, color: int, rng: np.random.RandomState) -> Sprite:
        """One of the digit's pictures (a shape has but one), in a shade of the colour."""
        masks = self.masks[kind, size]
        alpha = masks[rng.randint(len(masks)) if kind < len(DIGITS) else 0][..., None]
        return Sprite(alpha, _RGB[color] * rng.uniform(0.85, 1.08))


class SceneGenerator:
    """Draws scenes with the digits of one split.

    The random numbers come from the generator handed to :meth:`draw` (``numpy.random.RandomState``: its streams are
    frozen by NumPy's compatibility policy), so that a scene depends on nothing else.
    """

    def __init__(self, split: str):
        self._sprites = SpriteSet(split)

    def draw(self, rng: np.random.RandomState, grid: int = GRID) -> Scene:
        """Draws one scene.

        Args:
            rng: source of all random numbers.
            grid: patches per side, at least 8; smaller pictures hold fewer objects (2-4 up to 8, 4-8 up to 12, 10-22
                above, where the last object drawn may bring its neighbour along).

        Returns:
            The scene; ``image`` is ``[7 * grid, 7 * grid, 3]``.

        Raises:
            ValueError: ``grid`` is below 8.
        """
        if grid < 8:
            raise ValueError(f"a scene needs a grid of at least 8 patches per side, got {grid}")
        pixels = grid * PATCH
        image = np.empty((pixels, pixels, 3), np.float32)
        image[:] = rng.randint(0, 70)
        coarse = rng.randn(grid // 2 + 2, grid // 2 + 2) * 12
        image += np.kron(coarse, np.ones((2 * PATCH, 2 * PATCH)))[:pixels, :pixels, None]
        wanted, scraps = _density(grid, rng)
        occupied = np.zeros((pixels, pixels), bool)
        for _ in range(rng.randint(*scraps)):
            _draw_scrap(image, occupied, rng)
        objects = self._draw_objects(image, occupied, wanted, rng)
        image += rng.randn(pixels, pixels, 1) * 6
        return Scene(np.clip(image, 0, 255).astype(np.uint8), objects, *_label_patches(objects, grid))

    def _draw_objects(self, image, occupied, wanted: int, rng) -> list[SceneObject]:
        pixels = len(image)
        objects: list[SceneObject] = []
        for _ in range(60):
            if len(objects) >= wanted:
                break
            u = rng.rand()
            group = "shape and digit" if u < 0.2 else "number" if u < 0.32 else "single"
            size = SIZES[rng.randint(len(SIZES))]
            width = size if group == "single" else 2 * size
            x, y = rng.randint(0, pixels - width + 1), rng.randint(0, pixels - size + 1)
            if occupied[y : y + size, x : x + width].any():
                continue
            color = rng.randint(len(COLORS))
            if group == "single":
                digit = rng.rand() < 0.55
                kind = rng.randint(len(DIGITS)) if digit else len(DIGITS) + rng.randint(len(SHAPES))
                objects.append(SceneObject(kind, color, x, y, size))
                self._paint(image, occupied, objects[-1], rng)
                continue
            right = len(objects) + 1
            if group == "number":
                first = SceneObject(rng.randint(len(DIGITS)), color, x, y, size, second_digit=right)
            else:
                first = SceneObject(len(DIGITS) + rng.randint(len(SHAPES)), color, x, y, size, neighbour=right)
            self._paint(image, occupied, first, rng)
            second = SceneObject(rng.randint(len(DIGITS)), color, x + size, y, size)
            if group == "shape and digit":
                second = replace(second, color=rng.randint(len(COLORS)))
            self._paint(image, occupied, second, rng)
            objects += [first, second]
        return objects

    def _paint(self, image, occupied, obj: SceneObject, rng) -> None:
        self._sprites.draw(obj.kind, obj.size, obj.color, rng).paint_on(image, obj.x, obj.y)
        low, high = -_MARGIN, obj.size + _MARGIN
        occupied[max(0, obj.y + low) : obj.y + high, max(0, obj.x + low) : obj.x + high] = True


def _load_digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the pictures of the embedded model need scikit-learn's digits: pip install scikit-learn"
        ) from error
    return load_digits()


def _density(grid: int, rng) -> tuple[int, tuple[int, int]]:
    """Number of objects, and the half-open range of the number of scraps."""
    wanted = rng.randint(10, 23)  # drawn on every grid: part of the order of draws
    if grid <= 8:
        return rng.randint(2, 5), (0, 2)
    if grid <= 12:
        return rng.randint(4, 9), (0, 4)
    return wanted, (4, 15)


def _draw_scrap(image, occupied, rng) -> None:
    """A grey texture scrap: salient, and never the answer to anything."""
    size = rng.randint(10, 20)
    x, y = rng.randint(0, len(image) - size + 1), rng.randint(0, len(image) - size + 1)
    box = np.s_[y : y + size, x : x + size]
    if occupied[box].any():
        return
    texture = _resize(rng.rand(8, 8).astype(np.float32), size)[..., None]
    image[box] = image[box] * 0.4 + texture * (rng.uniform(60, 190) + rng.randn(3) * 18)
    occupied[box] = True


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, ``[n, n] -> [size, size]``."""
    n = len(image)
    at = (np.arange(size) + 0.5) * n / size - 0.5
    low = np.clip(np.floor(at).astype(int), 0, n - 1)
    high = np.clip(low + 1, 0, n - 1)
    part = np.clip(at - low, 0, 1)
    rows = image[low] * (1 - part)[:, None] + image[high] * part[:, None]
    return rows[:, low] * (1 - part)[None] + rows[:, high] * part[None]


def _shape_mask(name: str, size: int) -> np.ndarray:
    """Float32 ``[size, size]`` of 0 and 1."""
    row, column = np.mgrid[0:size, 0:size]
    x, y = ((axis - (size - 1) / 2) / (size / 2) for axis in (column, row))
    radius, largest = np.hypot(x, y), np.maximum(abs(x), abs(y))
    masks = {
        "circle": radius < 0.92,
        "square": largest < 0.85,
        "triangle": (y < 0.85) & (abs(x) < (y + 0.95) * 0.52),
        "star": radius < 0.62 + 0.36 * np.cos(5 * (np.arctan2(y, x) + np.pi / 2)),
        "cross": ((abs(x) < 0.28) | (abs(y) < 0.28)) & (largest < 0.95),
        "ring": (radius < 0.98) & (radius > 0.55),
    }
    return masks[name].astype(np.float32)


def _label_patches(objects: list[SceneObject], grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, colour and object per patch, from the objects' boxes less a rim that ink seldom reaches."""
    class_map = np.full((grid, grid), NO_CLASS)
    color_map = np.full((grid, grid), NO_COLOR)
    object_map = np.full((grid, grid), NO_OBJECT)
    best = np.zeros((grid, grid))
    for index, obj in enumerate(objects):
        side_rim = 2 if obj.is_digit else 1
        left, right = obj.x + side_rim, obj.x + obj.size - side_rim
        top, bottom = obj.y + 1, obj.y + obj.size - 1
        for row in range(top // PATCH, (bottom - 1) // PATCH + 1):
            height = min(bottom, (row + 1) * PATCH) - max(top, row * PATCH)
            for column in range(left // PATCH, (right - 1) // PATCH + 1):
                cover = height * (min(right, (column + 1) * PATCH) - max(left, column * PATCH))
                if cover >= PATCH * PATCH * _MIN_COVER and cover > best[row, column]:
                    best[row, column] = cover
                    class_map[row, column], color_map[row, column] = obj.kind, obj.color
                    object_map[row, column] = index
    return class_map, color_map, object_map
