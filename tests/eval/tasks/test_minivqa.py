"""The task minivqa: its data, its scoring, and lmms-eval running it."""

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.tasks import minivqa
from eval.tasks.minivqa import dataset
from eval.tasks.minivqa.dataset import build_dataset, rows, task_override
from eval.tasks.minivqa.utils import normalise, process_results
from sparsevlm.mini.questions import TYPES
from sparsevlm.mini.vocabulary import CLASSES, COLORS

TASK_FOLDER = str(Path(minivqa.__file__).parent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_dataset(seed=3, n=24, cache_dir=tmp_path_factory.mktemp("minivqa"))


def load(folder):
    from datasets import load_dataset

    return load_dataset("parquet", data_files={"test": str(folder / "test.parquet")}, split="test")


def test_file_holds_the_rows(folder):
    data = load(folder)
    assert data.column_names == ["question_id", "image", "question", "answer", "question_type", "target_patches"]
    for stored, row in zip(data, rows(seed=3, n=24), strict=True):
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert np.array_equal(np.asarray(stored.pop("image")), np.asarray(picture))
        assert picture.size == (168, 168) and picture.mode == "RGB"
        row.pop("image")
        assert stored == row


def test_same_seed_same_rows_other_seed_other_rows_smaller_set_is_a_prefix():
    first = list(rows(seed=3, n=12))
    assert list(rows(seed=3, n=16))[:12] == first
    other = list(rows(seed=4, n=12))
    assert all(a["image"] != b["image"] for a, b in zip(first, other, strict=True))


def test_pictures_show_digits_of_the_test_split(monkeypatch):
    splits = []

    class Recorder(dataset.SceneGenerator):
        def __init__(self, split):
            splits.append(split)
            super().__init__(split)

    monkeypatch.setattr(dataset, "SceneGenerator", Recorder)
    list(rows(seed=0, n=1))
    assert splits == ["test"]


def test_any_beginning_is_balanced_over_the_types_and_pictures_differ():
    found = list(rows(seed=0, n=43))
    for n in (9, 11, 43):
        counts = [sum(row["question_type"] == name for row in found[:n]) for name in TYPES]
        assert max(counts) - min(counts) <= 1
    assert len({row["image"]["bytes"] for row in found}) == len(found)


def test_answers_are_of_their_type_and_targets_on_the_grid():
    allowed = {
        "digit_of_color": CLASSES[:10],
        "color_of_digit": COLORS,
        "shape_of_color": CLASSES[10:],
        "color_of_shape": COLORS,
        "exist": ("yes", "no"),
        "count": CLASSES[:10],
        "beside": CLASSES[:10],
        "read": tuple(f"{i:02d}" for i in range(100)),
        "next": CLASSES[:10],
    }
    for row in rows(seed=5, n=81):
        assert row["answer"] in allowed[row["question_type"]]
        targets = row["target_patches"]
        assert targets == sorted(set(targets)) and all(0 <= t < 576 for t in targets)
        if row["question_type"] not in ("exist", "count"):
            assert bool(targets) == (row["question_type"] != "next")


def test_finished_file_is_kept_and_a_broken_build_leaves_nothing(tmp_path, monkeypatch):
    folder = build_dataset(seed=1, n=2, cache_dir=tmp_path)
    before = (folder / "test.parquet").stat().st_mtime_ns
    assert build_dataset(seed=1, n=2, cache_dir=tmp_path) == folder
    assert (folder / "test.parquet").stat().st_mtime_ns == before

    def dies(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("datasets.Dataset.to_parquet", dies)
    with pytest.raises(OSError, match="disk full"):
        build_dataset(seed=2, n=2, cache_dir=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder]


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": -3}, {"seed": -1}])
def test_bad_arguments_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="minivqa"):
        build_dataset(**({"seed": 0, "n": 1} | bad), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_override_needs_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="call build_dataset first"):
        task_override(tmp_path)


@pytest.mark.parametrize(
    ("answer", "output", "score"),
    [
        ("red", "Red.", 1.0),
        ("red", " red", 1.0),
        ("red", "blue", 0.0),
        ("red", "red red", 0.0),
        ("red", "", 0.0),
        ("42", "4 2", 1.0),
        ("42", "42", 1.0),
        ("42", "2 4", 0.0),
        ("42", "4", 0.0),
        ("yes", "yes it is", 0.0),
    ],
)
def test_exact_match(answer, output, score):
    result = process_results({"answer": answer, "question_type": "read"}, [output])
    assert result == {"visual_accuracy": score, "accuracy": score, "accuracy_read": score, "question_type": "read"}
    assert normalise("_a-B c\n") == "abc"


def evaluate(folder, answer, limit=None):
    """Runs lmms-eval on the task with a model whose output for a document is ``answer(doc)``."""
    from lmms_eval import evaluator
    from lmms_eval.api.model import lmms
    from lmms_eval.tasks import TaskManager

    class Stub(lmms):
        is_simple = True

        def generate_until(self, requests):
            outputs = []
            for request in requests:
                context, _, doc_to_visual, doc_id, task, split = request.args
                doc = self.task_dict[task][split][doc_id]
                assert context == doc["question"]
                (picture,) = doc_to_visual(doc)
                assert picture.size == (168, 168)
                outputs.append(answer(doc))
            return outputs

        def loglikelihood(self, requests):
            raise NotImplementedError

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

        def clean(self):
            pass

    return evaluator.simple_evaluate(
        model=Stub(),
        tasks=[task_override(folder)],
        task_manager=TaskManager(include_path=TASK_FOLDER, include_defaults=False, model_name="stub"),
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
        cli_args=argparse.Namespace(output_path=None, process_with_media=False, reasoning_tags=None),
    )


def test_lmms_eval_gives_a_perfect_model_one_and_keeps_the_types(folder):
    out = evaluate(folder, lambda doc: doc["answer"])
    results = out["results"]["minivqa"]
    assert results["accuracy,none"] == 1.0
    assert all(results[f"accuracy_{name},none"] == 1.0 for name in TYPES)
    samples = out["samples"]["minivqa"]
    assert [sample["question_type"] for sample in samples] == [TYPES[i % 9] for i in range(24)]
    assert all(sample["accuracy"] == 1.0 for sample in samples)


def test_lmms_eval_gives_a_wrong_model_zero_and_honours_the_limit(folder):
    out = evaluate(folder, lambda doc: "none", limit=9)
    assert out["results"]["minivqa"]["accuracy,none"] == 0.0
    assert len(out["samples"]["minivqa"]) == 9


def test_a_model_right_on_one_type_scores_on_that_type_alone(folder):
    out = evaluate(folder, lambda doc: doc["answer"] if doc["question_type"] == "read" else "none")
    results = out["results"]["minivqa"]
    assert results["accuracy,none"] == pytest.approx(2 / 24)
    assert {name: results[f"accuracy_{name},none"] for name in TYPES} == {name: float(name == "read") for name in TYPES}
