"""Videos for the embedded video model: a few digits and shapes that appear, move and leave, in eight small frames.

A frame is 8 x 8 patches of 7 x 7 pixels (56 x 56 pixels); with the class token, which Video-LLaVA keeps, a clip takes
8 x 65 = 520 visual tokens. Sprites and split are those of the pictures: a digit in a test clip was never seen in
training.
"""

from dataclasses import dataclass

import numpy as np

from sparsevlm.mini.scenes import PATCH, SIZES, SpriteSet
from sparsevlm.mini.vocabulary import COLORS, DIGITS, SHAPES

FRAMES = 8
GRID = 8
#: Tokens per frame: the class token and the patches.
FRAME_TOKENS = 1 + GRID * GRID
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_PIXELS = GRID * PATCH
_SHORTEST = 3  # frames that an object is there at least
_LEAST_WAY = 14  # pixels that a moving object covers at least
_GAP = 2  # pixels between objects at least


@dataclass(frozen=True)
class ClipObject:
    """A digit or shape in a clip.

    Attributes:
        kind: index into ``CLASSES``.
        color: index into ``COLORS``; of two objects of a colour, one is a digit and one a shape.
        size: side of its box in pixels.
        start: the first frame that shows it.
        path: its box's left upper corner ``(x, y)`` in each frame that shows it.
        direction: key of ``DIRECTIONS``, or None if it stands still.
    """

    kind: int
    color: int
    size: int
    start: int
    path: tuple[tuple[int, int], ...]
    direction: str | None

    @property
    def is_digit(self) -> bool:
        return self.kind < len(DIGITS)

    @property
    def frames(self) -> range:
        return range(self.start, self.start + len(self.path))

    def box(self, frame: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in a frame that shows it."""
        x, y = self.path[frame - self.start]
        return x, y, x + self.size, y + self.size


@dataclass(frozen=True)
class Clip:
    """``frames`` uint8 ``[8, 56, 56, 3]``, and what they show."""

    frames: np.ndarray
    objects: list[ClipObject]

    def token_labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a language model could know of each visual token from it and those before, int64 ``[520]`` each.

        Returns:
            times: the token's frame.
            starts: the first frame of the object that it shows; -100 where it shows none.
            directions: where that object moves (index into ``DIRECTIONS``, 4: nowhere); -100 where it shows none, and
                before it has moved for two frames.
        """
        times = np.repeat(np.arange(FRAMES), FRAME_TOKENS)
        starts, directions = np.full((2, FRAMES * FRAME_TOKENS), -100)
        ways = [*DIRECTIONS, None]
        for i, obj in enumerate(self.objects):
            tokens = np.array(self.tokens_of((i,)))
            starts[tokens] = obj.start
            directions[tokens[times[tokens] >= obj.start + 2]] = ways.index(obj.direction)
        return times, starts, directions

    def tokens_of(self, objects: tuple[int, ...]) -> list[int]:
        """Indices (0 to 519) of the visual tokens whose patch one of the given objects covers at least in part."""
        found = set()
        for obj in (self.objects[i] for i in objects):
            for frame in obj.frames:
                left, top, right, bottom = obj.box(frame)
                rows, columns = (
                    range(top // PATCH, (bottom - 1) // PATCH + 1),
                    range(left // PATCH, (right - 1) // PATCH + 1),
                )
                found |= {frame * FRAME_TOKENS + 1 + row * GRID + column for row in rows for column in columns}
        return sorted(found)


class ClipGenerator:
    """Draws clips with the digits of one split; a clip depends on the random state handed over alone."""

    def __init__(self, split: str):
        self._sprites = SpriteSet(split)

    def draw(self, rng: np.random.RandomState) -> Clip:
        """A clip of two to four objects."""
        wanted = rng.randint(2, 5)
        objects: list[ClipObject] = []
        while len(objects) < wanted:
            new = _draw_object(rng)
            if all(_fit(new, old) for old in objects):
                objects.append(new)
        frames = np.empty((FRAMES, _PIXELS, _PIXELS, 3), np.float32)
        frames[:] = rng.randint(0, 70)
        coarse = rng.randn(GRID // 2 + 2, GRID // 2 + 2) * 12
        frames += np.kron(coarse, np.ones((2 * PATCH, 2 * PATCH)))[:_PIXELS, :_PIXELS, None]
        for obj in objects:
            sprite = self._sprites.draw(obj.kind, obj.size, obj.color, rng)
            for frame in obj.frames:
                sprite.paint_on(frames[frame], *obj.path[frame - obj.start])
        frames += rng.randn(FRAMES, _PIXELS, _PIXELS, 1) * 6
        return Clip(np.clip(frames, 0, 255).astype(np.uint8), objects)


def _draw_object(rng) -> ClipObject:
    kind = rng.randint(len(DIGITS)) if rng.rand() < 0.5 else len(DIGITS) + rng.randint(len(SHAPES))
    color, size = rng.randint(len(COLORS)), SIZES[rng.randint(len(SIZES))]
    start = rng.randint(0, FRAMES - _SHORTEST + 1)
    length = rng.randint(_SHORTEST, FRAMES - start + 1)
    space = _PIXELS - size
    x, y = rng.randint(0, space + 1, 2)
    direction = None
    steps = np.zeros((length, 2))
    if rng.rand() < 0.7:
        direction = list(DIRECTIONS)[rng.randint(len(DIRECTIONS))]
        way = rng.randint(_LEAST_WAY, space + 1)
        dx, dy = DIRECTIONS[direction]
        if dx:
            x = rng.randint(0, space - way + 1) + (way if dx < 0 else 0)
        else:
            y = rng.randint(0, space - way + 1) + (way if dy < 0 else 0)
        steps = np.linspace(0, way, length)[:, None] * [dx, dy]
    path = tuple((int(round(x + sx)), int(round(y + sy))) for sx, sy in steps)
    return ClipObject(kind, color, size, start, path, direction)


def _fit(one: ClipObject, other: ClipObject) -> bool:
    """Neither mistaken for one another nor overlapping in any frame."""
    if one.color == other.color and one.is_digit == other.is_digit:
        return False
    for frame in set(one.frames) & set(other.frames):
        left, top, right, bottom = one.box(frame)
        other_left, other_top, other_right, other_bottom = other.box(frame)
        apart_x = left >= other_right + _GAP or other_left >= right + _GAP
        apart_y = top >= other_bottom + _GAP or other_top >= bottom + _GAP
        if not (apart_x or apart_y):
            return False
    return True
