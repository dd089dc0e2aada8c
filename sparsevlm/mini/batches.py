"""Training batches: drawn scenes as tensors, each batch from its own random stream, so that any step can be redrawn."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sparsevlm.mini import questions
from sparsevlm.mini.hub import MEAN, STD
from sparsevlm.mini.scenes import GRID, NO_CLASS, Scene, SceneGenerator
from sparsevlm.mini.vocabulary import EOS, WORD_ID

#: Tokens per packed question: the longest question, its prompt and answer take 11.
QUESTION_TOKENS = 12
PREFIX = tuple(WORD_ID[word] for word in ("<s>", "user", ":"))
SUFFIX = ("assistant", ":")
#: Weight of a target: an answer, the end after it, and the answer foretold at the question's last words.
ANSWER_WEIGHT, END_WEIGHT, FORETOLD_WEIGHT = 1.0, 0.1, 0.4
_TRAIN_STREAM, _TEST_STREAM = 0x7261, 0x7465


@dataclass(frozen=True)
class BatchShape:
    """Grid per side, pictures per batch, questions packed behind each picture (0: none)."""

    grid: int
    images: int
    questions: int = 0


class SceneBatches(Dataset):
    """Batch ``i`` of a stream: a dict of tensors that depends on split, seed, phase and ``i`` alone.

    ``pixels`` float32 ``[B, 3, 7g, 7g]``, ``positions`` int64 ``[B, g*g]`` (where the window lies on the 24 x 24 grid),
    ``classes`` and ``colors`` int64 ``[B, g*g]``; with questions also ``ids``, ``targets`` int64 and ``weights``
    float32 ``[B, questions * 12]`` and ``types`` int64 ``[B, questions]`` (indices into ``questions.TYPES``).
    """

    def __init__(self, split: str, seed: int, phase: int, shape: BatchShape):
        self.shape = shape
        self._stream = (_TRAIN_STREAM if split == "train" else _TEST_STREAM, seed, phase)
        self._generator = SceneGenerator(split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.RandomState([*self._stream, index])
        samples = [self._sample(rng) for _ in range(self.shape.images)]
        batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
        batch["pixels"] = ((batch["pixels"].float() / 255.0 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()
        return batch

    def loader(self, indices: Iterable[int], workers: int) -> DataLoader:
        """The batches of ``indices`` in order, drawn ahead by ``workers`` processes (0: in this one)."""
        return DataLoader(self, batch_size=None, sampler=indices, num_workers=workers)

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
        }
        if self.shape.questions:
            sample |= _pack(scene, self.shape.questions, rng)
        return sample


def _pack(scene: Scene, count: int, rng) -> dict[str, np.ndarray]:
    """Questions as blocks of 12 tokens, padded with 0, and what to predict at each token."""
    ids = np.zeros((count, QUESTION_TOKENS), np.int64)
    targets = np.zeros((count, QUESTION_TOKENS), np.int64)
    weights = np.zeros((count, QUESTION_TOKENS), np.float32)
    drawn = questions.draw(scene.objects, count, rng)
    if not drawn:
        raise ValueError("a scene without objects has no questions")  # the generator places at least one
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
    types = np.array([questions.TYPES.index(question.type) for question in drawn])
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
