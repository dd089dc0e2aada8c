"""Training batches: what they hold, and that any can be drawn again."""

from collections import Counter

import numpy as np
import torch

from sparsevlm.mini import questions
from sparsevlm.mini.scenes import NO_CLASS, NO_COLOR, SceneGenerator
from sparsevlm.mini.training.batches import ANSWER_WEIGHT, END_WEIGHT, FORETOLD_WEIGHT, BatchShape, SceneBatches
from sparsevlm.mini.vocabulary import WORDS


def test_a_batch_depends_on_split_seed_phase_and_index_alone():
    shape = BatchShape(8, 2, 3)
    first = SceneBatches("train", 0, 1, shape)[7]
    again = next(iter(SceneBatches("train", 0, 1, shape).loader([7], workers=0)))
    assert all(torch.equal(first[key], again[key]) for key in first)
    for other in (("test", 0, 1, 7), ("train", 1, 1, 7), ("train", 0, 2, 7), ("train", 0, 1, 8)):
        assert not torch.equal(first["pixels"], SceneBatches(*other[:3], shape)[other[3]]["pixels"])


def test_packed_tokens_targets_and_weights():
    batch = SceneBatches("train", 0, 0, BatchShape(24, 4, 8))[0]
    rows = zip(*(batch[key].view(32, 12).tolist() for key in ("ids", "targets", "weights")), strict=True)
    for (ids, targets, weights), type_ in zip(rows, batch["types"].flatten().tolist(), strict=True):
        words = [WORDS[i] for i in ids if i]
        at = words.index("?")
        assert words[at + 1 : at + 3] == ["assistant", ":"]
        answer = words[at + 3 :]
        assert len(answer) == (2 if questions.TYPES[type_] == "read" else 1)
        weights = [round(w, 3) for w in weights]
        expected = [0.0] * 12
        expected[at - 1 : at + 2] = [FORETOLD_WEIGHT] * 3
        expected[at + 2 : at + 3 + len(answer)] = [ANSWER_WEIGHT] * len(answer) + [END_WEIGHT]
        assert weights == expected
        assert [WORDS[t] for t in targets[at - 1 : at + 3 + len(answer)]] == [answer[0]] * 3 + answer + ["</s>"]


def test_labels_of_relations():
    """Left neighbour and place in reading order, derived again from the pictures' objects by other code."""
    batches = SceneBatches("train", 0, 0, BatchShape(24, 1))
    generator, seen = SceneGenerator("train"), Counter()
    for index in range(4):
        scene = generator.draw(np.random.RandomState([*batches._stream, index]))
        batch = {key: value[0].tolist() for key, value in batches[index].items() if value.ndim == 2}
        middles = [((o.y + o.size / 2) // 7 * 24 + (o.x + o.size / 2) // 7) for o in scene.objects]
        for patch, number in enumerate(scene.object_map.reshape(-1).tolist()):
            found = batch["left_classes"][patch], batch["left_colors"][patch]
            if number < 0:
                assert found == (-100, -100)
                continue
            obj = scene.objects[number]
            touching = [o for o in scene.objects if number in (o.neighbour, o.second_digit)]
            assert all((o.x + o.size, o.y) == (obj.x, obj.y) for o in touching)
            assert found == ((touching[0].kind, touching[0].color) if touching else (NO_CLASS, NO_COLOR))
            seen["left"] += bool(touching)
        assert np.flatnonzero(batch["centers"]).tolist() == sorted(map(int, middles))
        for patch in range(576):
            if patch not in middles:
                assert batch["color_ranks"][patch] == batch["class_ranks"][patch] == -100
                continue
            obj = scene.objects[middles.index(patch)]
            before = [o for o, middle in zip(scene.objects, middles, strict=True) if middle < patch]
            alike = [o for o in before if (o.color, o.is_digit) == (obj.color, obj.is_digit)]
            assert batch["color_ranks"][patch] == len(alike)
            assert batch["class_ranks"][patch] == sum(o.kind == obj.kind for o in before)
            seen["ranked"] += bool(alike)
    assert seen["left"] > 0 and seen["ranked"] > 0
