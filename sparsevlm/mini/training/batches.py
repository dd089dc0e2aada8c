"""Training batches: drawn scenes or clips as tensors, each from its own random stream: any step can be redrawn."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sparsevlm.mini import clip_questions, questions
from sparsevlm.mini.clips import ClipGenerator
from sparsevlm.mini.questions import Question
from sparsevlm.mini.scenes import GRID, NO_CLASS, NO_COLOR, PATCH, Scene, SceneGenerator, SceneObject
from sparsevlm.mini.training.hub import MEAN, STD
from sparsevlm.mini.vocabulary import EOS, WORD_ID

#: Tokens per packed question: the longest question, its prompt and answer take 11.
QUESTION_TOKENS = 12
PREFIX = tuple(WORD_ID[word] for word in ("<s>", "user", ":"))
SUFFIX = ("assistant", ":")
#: Weight of a target: an answer, the end after it, and the answer foretold at the question's last words.
ANSWER_WEIGHT, END_WEIGHT, FORETOLD_WEIGHT = 1.0, 0.1, 0.4
#: Highest place in reading order that has a label of its own.
RANKS = 9
_TRAIN_STREAM, _TEST_STREAM = 0x7261, 0x7465


@dataclass(frozen=True)
class BatchShape:
    """Grid per side, pictures (or clips) per batch, questions packed behind each (0: none)."""

    grid: int
    images: int
    questions: int = 0
    clips: bool = False

    def batches(self, split: str, seed: int, phase: int) -> "SceneBatches | ClipBatches":
        """The stream of such batches of a split, a seed and a phase."""
        return (ClipBatches if self.clips else SceneBatches)(split, seed, phase, self)


class _Batches(Dataset):
    """Batch ``i`` of a stream: a dict of tensors that depends on split, seed, phase and ``i`` alone."""

    #: Names of the question types that ``types`` counts.
    types: tuple[str, ...]

    def __init__(self, split: str, seed: int, phase: int, shape: BatchShape):
        self.shape = shape
        self._stream = (_TRAIN_STREAM if split == "train" else _TEST_STREAM, seed, phase)
        self._generator = self._make_generator(split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.RandomState([*self._stream, index])
        samples = [self._sample(rng) for _ in range(self.shape.images)]
        batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
        batch["pixels"] = ((batch["pixels"].float() / 255.0 - MEAN) / STD).movedim(-1, -3).contiguous()
        return batch

    def loader(self, indices: Iterable[int], workers: int) -> DataLoader:
        """The batches of ``indices`` in order, drawn ahead by ``workers`` processes (0: in this one)."""
        return DataLoader(self, batch_size=None, sampler=indices, num_workers=workers)


class SceneBatches(_Batches):
    """Batches of pictures.

    ``pixels`` float32 ``[B, 3, 7g, 7g]``, ``positions`` int64 ``[B, g*g]`` (where the window lies on the 24 x 24 grid),
    ``classes`` and ``colors`` int64 ``[B, g*g]``, ``centers`` float32 ``[B, g*g]`` (1 where a patch holds the middle of
    an object), ``left_classes``, ``left_colors`` int64 ``[B, g*g]`` (of what the patch's object has at its left side;
    ``NO_CLASS`` and ``NO_COLOR`` if nothing, -100 on the background), ``color_ranks``, ``class_ranks`` int64
    ``[B, g*g]`` (at the middle of an object: how many of its colour and sort, or of its class, come before it in
    reading order; -100 elsewhere); with questions also ``ids``, ``targets`` int64 and ``weights`` float32
    ``[B, questions * 12]`` and ``types`` int64 ``[B, questions]`` (indices into ``questions.TYPES``).
    """

    types = questions.TYPES
    _make_generator = SceneGenerator

    def _sample(self, rng) -> dict[str, np.ndarray]:
        grid = self.shape.grid
        scene = self._generator.draw(rng, grid)
        top, left = rng.randint(0, GRID - grid + 1, 2)
        row, column = np.mgrid[0:grid, 0:grid]
        sample = {
            "pixels": scene.image,
            "positions": ((row + top) * GRID + column + left).reshape(-1),
            "classes": scene.class_map.reshape(-1),
            "colors": scene.color_map.reshape(-1),
            "centers": _centers(scene),
            **_relations(scene),
        }
        if self.shape.questions:
            drawn = questions.draw(scene.objects, self.shape.questions, rng)
            if not drawn:
                raise ValueError("a scene without objects has no questions")  # the generator places at least one
            sample |= _pack(drawn, self.types)
        return sample


class ClipBatches(_Batches):
    """Batches of clips.

    ``pixels`` float32 ``[B, 8, 3, 56, 56]``; ``times``, ``starts``, ``directions`` int64 ``[B, 520]`` (see
    :meth:`sparsevlm.mini.clips.Clip.token_labels`); ``ids``, ``targets``, ``weights`` and ``types`` as
    :class:`SceneBatches`, with the types of ``clip_questions.TYPES``.
    """

    types = clip_questions.TYPES
    _make_generator = ClipGenerator

    def _sample(self, rng) -> dict[str, np.ndarray]:
        clip = self._generator.draw(rng)
        drawn = clip_questions.draw(clip.objects, self.shape.questions, rng)
        labels = dict(zip(("times", "starts", "directions"), clip.token_labels(), strict=True))
        return {"pixels": clip.frames} | labels | _pack(drawn, self.types)


def _center(obj: SceneObject, grid: int) -> int:
    """The patch that holds the middle of an object."""
    row, column = ((2 * start + obj.size) // (2 * PATCH) for start in (obj.y, obj.x))
    return row * grid + column


def _centers(scene: Scene) -> np.ndarray:
    grid = len(scene.object_map)
    centers = np.zeros(grid * grid, np.float32)
    centers[[_center(obj, grid) for obj in scene.objects]] = 1
    return centers


def _relations(scene: Scene) -> dict[str, np.ndarray]:
    """What a patch's object stands to the right of, and which of its kind it is in reading order; -100: no label."""
    objects, patches = scene.objects, scene.object_map.size
    labels = {name: np.full(patches, -100) for name in ("left_classes", "left_colors", "color_ranks", "class_ranks")}
    of_patch = scene.object_map.reshape(-1)
    labels["left_classes"][of_patch >= 0], labels["left_colors"][of_patch >= 0] = NO_CLASS, NO_COLOR
    for obj in objects:
        right = obj.second_digit if obj.neighbour is None else obj.neighbour
        if right is not None:
            labels["left_classes"][of_patch == right] = obj.kind
            labels["left_colors"][of_patch == right] = obj.color
    center = [_center(obj, len(scene.object_map)) for obj in objects]
    for i, obj in enumerate(objects):
        before = [other for j, other in enumerate(objects) if center[j] <= center[i]]
        same_color = sum((other.color, other.is_digit) == (obj.color, obj.is_digit) for other in before)
        labels["color_ranks"][center[i]] = min(same_color, RANKS) - 1
        labels["class_ranks"][center[i]] = min(sum(other.kind == obj.kind for other in before), RANKS) - 1
    return labels


def _pack(drawn: list[Question], known_types: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Questions as blocks of 12 tokens, padded with 0, and what to predict at each token."""
    ids, targets = (np.zeros((len(drawn), QUESTION_TOKENS), np.int64) for _ in range(2))
    weights = np.zeros((len(drawn), QUESTION_TOKENS), np.float32)
    for block, question in enumerate(drawn):
        asked = [WORD_ID[word] for word in (*question.words, *SUFFIX)]
        answer = [WORD_ID[word] for word in question.answer]
        end = len(asked) + len(answer)
        ids[block, :end] = asked + answer
        # Without this the model settles on "some digit that is there": the answer is a target already at the last
        # content word, "?" and "assistant".
        foretold = slice(len(question.words) - 2, len(asked) - 1)
        targets[block, foretold], weights[block, foretold] = answer[0], FORETOLD_WEIGHT
        targets[block, len(asked) - 1 : end] = [*answer, WORD_ID[EOS]]
        weights[block, len(asked) - 1 : end - 1], weights[block, end - 1] = ANSWER_WEIGHT, END_WEIGHT
    types = np.array([known_types.index(question.type) for question in drawn])
    return {"ids": ids.reshape(-1), "targets": targets.reshape(-1), "weights": weights.reshape(-1), "types": types}


def objects_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bool ``[B, patches]``: patches that an object covers."""
    return batch["classes"] < NO_CLASS


def averages(tallies: Iterable[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Sums (total, count) pairs by name over batches and divides; a name that was never counted is left out."""
    sums: dict[str, list[float]] = {}
    for tally in tallies:
        for name, pair in tally.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + pair[0], entry[1] + pair[1]
    return {name: total / number for name, (total, number) in sums.items() if number}
