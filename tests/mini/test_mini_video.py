"""The shipped video model: layout, the prompt of the training, and that its answers come from the clip."""

import json

import numpy as np
import pytest
import torch

import sparsevlm
from eval.tasks.minivqa.utils import process_results
from eval.tasks.minivqa_video.dataset import rows
from eval.tasks.minivqa_video.utils import doc_to_visual
from sparsevlm.mini import weights_dir
from sparsevlm.mini.vocabulary import VIDEO_WORDS, WORD_ID
from tests.mini.test_mini_checkpoint import HUB_FILES


@pytest.fixture(scope="module")
def loaded():
    return sparsevlm.load("mini-video", dtype="float32")


@pytest.fixture(scope="module")
def documents():
    from io import BytesIO

    from PIL import Image

    found = []
    for row in rows(seed=7, n=30):
        frames = [Image.open(BytesIO(frame["bytes"])) for frame in row["frames"]]
        found.append({**row, "frames": frames})
    return found


@torch.no_grad()
def scores(loaded, questions, clips) -> list[float]:
    model, processor = loaded
    found = []
    for start in range(0, len(questions), 15):
        part = slice(start, start + 15)
        texts = [doc["question"] for doc in questions[part]]
        inputs = processor(text=texts, videos=[doc_to_visual(doc)[0] for doc in clips[part]])
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for doc, ids in zip(questions[part], out, strict=True):
            found.append(process_results(doc, [processor.decode(ids)])["accuracy"])
    return found


def test_folder_is_laid_out_as_video_llavas():
    assert {path.name for path in weights_dir("mini-video").iterdir()} == HUB_FILES - {"processor_config.json"}


def test_token_ids_are_those_of_the_training(loaded, documents):
    _, processor = loaded
    ids = processor(text="what digit is first ?", videos=doc_to_visual(documents[0])[0])["input_ids"][0].tolist()
    words = ["<s>", "user", ":", *["<video>"] * 520, *"what digit is first ? assistant :".split()]
    assert ids == [WORD_ID[word] for word in words] and set(words) <= set(VIDEO_WORDS)


def test_it_answers_about_unseen_clips_and_not_without_looking(loaded, documents):
    """.9 over all types when it was trained; of another clip's frames it knows little more than chance."""
    right = scores(loaded, documents, documents)
    assert np.mean(right) >= 0.8
    others = [*documents[6:], *documents[:6]]  # types take turns: a clip of the same type of question
    assert np.mean(scores(loaded, documents, others)) <= np.mean(right) - 0.3


def test_a_run_prunes_the_clip_as_a_video(tmp_path, monkeypatch, capsys):
    """192 of 520: more than the 64 tokens of one of its pictures, which a budget for videos may be."""
    from eval.run import main

    monkeypatch.chdir(tmp_path)
    asked = ["model=mini_video", "task=minivqa_video", "method=random", "budget=192", "limit=6"]
    assert main([*asked, "results_dir=results"]) == 0
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 6 and metrics["task"] == "minivqa_video"
    assert "192.0 leaving" in capsys.readouterr().out
    assert main([*asked[:3], "budget=521", "results_dir=results"]) != 0
    assert "521 is above the 520 visual tokens" in capsys.readouterr().err
