"""Clips and their questions, the task minivqa_video, and the video model's architecture."""

import numpy as np
import pytest
import torch
from datasets import load_dataset

from eval.tasks.minivqa_video.dataset import build_dataset, rows
from eval.tasks.minivqa_video.utils import doc_to_visual
from sparsevlm.mini import clip_questions, weights_dir
from sparsevlm.mini.clips import DIRECTIONS, FRAME_TOKENS, FRAMES, ClipGenerator
from sparsevlm.mini.model import build_video_model, embed_frames
from sparsevlm.mini.training.batches import BatchShape, ClipBatches
from sparsevlm.mini.training.finetune import Answering
from sparsevlm.mini.training.hub import MEAN, STD, export, load_weights
from sparsevlm.mini.vocabulary import CLASSES, COLORS, VIDEO_VOCAB_SIZE, VIDEO_WORDS, WORD_ID, WORDS
from sparsevlm.models import load


@pytest.fixture(scope="module")
def clips():
    generator, rng = ClipGenerator("test"), np.random.RandomState(0)
    return [generator.draw(rng) for _ in range(60)]


@pytest.fixture(scope="module")
def fresh():
    """The video model before any training of its own."""
    return build_video_model(load_weights(weights_dir()), seed=0).eval()


def test_same_random_state_same_clip():
    generator = ClipGenerator("test")
    first, again, other = (generator.draw(np.random.RandomState(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first.frames, again.frames) and first.objects == again.objects
    assert first.frames.shape == (8, 56, 56, 3) and first.frames.dtype == np.uint8
    assert not np.array_equal(first.frames, other.frames)


def test_objects_stay_in_the_picture_apart_and_move_as_they_say(clips):
    for clip in clips:
        assert 2 <= len(clip.objects) <= 4
        for obj in clip.objects:
            assert 3 <= len(obj.path) and obj.frames.stop <= FRAMES
            (x, y), (last_x, last_y) = obj.path[0], obj.path[-1]
            if obj.direction is None:
                assert set(obj.path) == {(x, y)}
            else:
                dx, dy = DIRECTIONS[obj.direction]
                assert (np.sign(last_x - x), np.sign(last_y - y)) == (dx, dy)
                assert abs(last_x - x) + abs(last_y - y) >= 13
        for frame in range(FRAMES):
            ink = np.zeros((56, 56), int)
            for obj in clip.objects:
                if frame in obj.frames:
                    left, top, right, bottom = obj.box(frame)
                    assert 0 <= left and 0 <= top and right <= 56 and bottom <= 56
                    ink[top:bottom, left:right] += 1
            assert ink.max() <= 1


def test_frames_show_an_object_while_it_is_there_and_only_then(clips):
    """White objects: where they are it is brighter than in the frames in which they are not."""
    checked = 0
    for clip in clips:
        for obj in clip.objects:
            if COLORS[obj.color] != "white" or len(obj.path) == FRAMES or obj.direction:
                continue
            left, top, right, bottom = obj.box(obj.start)
            others = [o for o in clip.objects if o is not obj]
            for frame in range(FRAMES):
                if any(frame in o.frames for o in others):
                    continue
                bright = clip.frames[frame, top:bottom, left:right].astype(float).max()
                assert (bright > 170) == (frame in obj.frames)
                checked += 1
    assert checked


def test_answers_are_true(clips):
    """Every answer is derived again from the objects, by other code."""
    rng, seen = np.random.RandomState(1), set()
    for clip in clips:
        for found in clip_questions.candidates(clip.objects, rng).values():
            for question in found:
                assert question.answer == (_answer(question, clip.objects),), question
                seen.add(question.type)
    assert seen == set(clip_questions.TYPES)


def _answer(question, objects) -> str:
    words = question.words
    named = [o for o in objects if CLASSES[o.kind] in words and COLORS[o.color] in words]
    if question.type in ("digit_of_color", "shape_of_color"):
        (obj,) = (o for o in objects if COLORS[o.color] in words and o.is_digit == ("digit" in words))
        return CLASSES[obj.kind]
    if question.type == "exist":
        return "yes" if named else "no"
    if question.type == "motion":
        (obj,) = named
        return obj.direction
    if question.type == "first_or_last":
        among = [o for o in objects if o.is_digit == ("digit" in words)]
        chosen = (min if "first" in words else max)(among, key=lambda o: o.start)
        assert sum(o.start == chosen.start for o in among) == 1
        return CLASSES[chosen.kind]
    at = words.index("before")
    (first,) = (o for o in objects if COLORS[o.color] == words[1] and CLASSES[o.kind] == words[2])
    (second,) = (o for o in objects if COLORS[o.color] == words[at + 1] and CLASSES[o.kind] == words[at + 2])
    return "yes" if first.start < second.start else "no"


def test_yes_and_no_are_balanced(clips):
    rng = np.random.RandomState(2)
    for name in ("exist", "order"):
        answers = [q.answer[0] for c in clips for q in clip_questions.candidates(c.objects, rng)[name]]
        assert answers.count("yes") == answers.count("no") > 50


def test_targets_lie_on_the_objects(clips):
    clip = clips[0]
    (obj,) = clip.objects[:1]
    tokens = clip.tokens_of((0,))
    frames = sorted({token // FRAME_TOKENS for token in tokens})
    assert frames == list(obj.frames)
    assert all(token % FRAME_TOKENS for token in tokens)  # no class token
    assert len(clip.tokens_of((0, 1))) > len(tokens)


def test_token_labels_say_when_the_object_came_and_where_it_moves(clips):
    for clip in clips[:10]:
        times, starts, directions = clip.token_labels()
        assert times.tolist() == [frame for frame in range(FRAMES) for _ in range(FRAME_TOKENS)]
        nothing = set(range(520)) - set(clip.tokens_of(tuple(range(len(clip.objects)))))
        assert all(starts[token] == directions[token] == -100 for token in nothing)
        for i, obj in enumerate(clip.objects):
            alone = set(clip.tokens_of((i,))) - set(
                clip.tokens_of(tuple(j for j in range(len(clip.objects)) if j != i))
            )
            for token in alone:
                assert starts[token] == obj.start
                known = times[token] >= obj.start + 2
                assert directions[token] == ([*DIRECTIONS, None].index(obj.direction) if known else -100)


def test_words_fit_the_vocabulary():
    assert VIDEO_WORDS[: len(WORDS)] == WORDS and len(VIDEO_WORDS) < VIDEO_VOCAB_SIZE
    assert [WORD_ID[word] for word in VIDEO_WORDS] == list(range(len(VIDEO_WORDS)))


def test_task_rows_are_stored_as_they_are(tmp_path):
    folder = build_dataset(seed=2, n=7, cache_dir=tmp_path)
    data = load_dataset("parquet", data_files={"test": str(folder / "test.parquet")}, split="test")
    drawn = list(rows(2, 7))
    assert [row["question_type"] for row in drawn] == [*clip_questions.TYPES, clip_questions.TYPES[0]]
    for stored, row in zip(data, drawn, strict=True):
        (video,) = doc_to_visual(stored)
        assert video.shape == (8, 56, 56, 3) and video.dtype == np.uint8
        for key in ("question", "answer", "question_type", "target_tokens"):
            assert stored[key] == row[key]
    assert build_dataset(seed=2, n=7, cache_dir=tmp_path) == folder


def test_the_video_model_begins_as_the_model_for_pictures(fresh):
    """On the patches of a window at the upper left, its towers see what the picture's tower sees."""
    state, own = load_weights(weights_dir()), fresh.state_dict()
    for tower in ("image_tower", "video_tower"):
        table = own[f"model.{tower}.embeddings.position_embedding.weight"]
        expected = state["model.vision_tower.embeddings.position_embedding.weight"]
        assert torch.equal(table[1 + 8 + 3], expected[1 + 24 + 3]) and torch.equal(table[0], expected[0])
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(own[name][: len(WORDS)], state[name][: len(WORDS)])
    pixels = torch.randn(1, 8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = fresh.model.multi_modal_projector(embed_frames(fresh, pixels))
        theirs = fresh.model.get_video_features(
            pixel_values_videos=pixels, vision_feature_layer=-1, output_hidden_states=True
        ).pooler_output
    torch.testing.assert_close(ours, theirs.reshape(ours.shape))


def test_packed_questions_about_a_clip_are_answered_as_if_alone(fresh, tmp_path):
    """Through the exported folder and the processor: same prompt, same logits."""
    model, processor = load(export(fresh, tmp_path / "model"), dtype="float32")
    batch = ClipBatches("test", 0, 0, BatchShape(8, 1, 2, clips=True))[0]
    learner = Answering(model, torch.float32, clip_questions.TYPES)
    frames = ((batch["pixels"][0].movedim(1, -1) * STD + MEAN) * 255).round().to(torch.uint8).numpy()
    with torch.no_grad():
        packed = learner._logits(batch, learner._visual(batch)).view(2, 12, -1)
        model.set_attn_implementation("sdpa")
        for block, ids in enumerate(batch["ids"].view(2, 12)):
            words = [VIDEO_WORDS[i] for i in ids.tolist() if i]
            asked = words[: words.index("assistant")]
            inputs = processor(text=" ".join(asked), videos=frames)
            assert inputs["input_ids"].shape[1] == 3 + 520 + len(asked) + 2
            logits = model(**inputs).logits[0, -1]
            torch.testing.assert_close(packed[block, len(asked) + 1], logits, rtol=1e-3, atol=1e-3)
