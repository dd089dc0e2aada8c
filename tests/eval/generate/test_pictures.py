"""Decoding and scaling once gives what doing it again would give."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

from eval.generate.lru import LeastRecentlyUsed
from eval.generate.pictures import DECODED_BYTES, Documents, PixelsOnce, decoded_once, remember_pixels


def jpeg(seed: int, size=(64, 48), mode="RGB") -> dict:
    drawn = np.random.RandomState(seed).randint(0, 255, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(drawn).convert(mode).save(buffer, "PNG" if mode == "LA" else "JPEG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def dataset():
    files = [jpeg(0), jpeg(1), jpeg(0), jpeg(2, mode="LA"), None, jpeg(0), jpeg(2, mode="LA")]
    rows = [{"id": i, "image": file} for i, file in enumerate(files)]
    return Dataset.from_list(rows, features=Features({"id": Value("int64"), "image": Image()}))


def same(a, b) -> bool:
    return a == b if a is None or b is None else (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())


def test_rows_are_those_of_the_dataset_and_a_file_is_decoded_once(dataset, monkeypatch):
    expected = [dataset[i] for i in range(len(dataset))]
    decoded, original = [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kw: decoded.append(1) or original(*args, **kw))
    documents = decoded_once(dataset)
    for _ in range(2):
        for i, row in enumerate(expected):
            found = documents[i]
            assert found["id"] == row["id"] and same(found["image"], row["image"])
    assert len(decoded) == 3


def test_what_a_task_does_to_a_picture_stays_with_it(dataset):
    documents = decoded_once(dataset)
    documents[0]["image"].thumbnail((8, 8))
    assert documents[2]["image"].size == (64, 48)


def test_little_memory_and_other_kinds_of_documents(dataset):
    none = Documents(dataset, LeastRecentlyUsed(10))
    assert same(none[0]["image"], dataset[0]["image"]) and none.column_names == ["id", "image"]
    assert decoded_once([{"a": 1}]) == [{"a": 1}] and DECODED_BYTES > 1 << 20


def test_what_was_not_used_for_longest_goes_first():
    kept = LeastRecentlyUsed(10)
    kept.put("a", 1, 4)
    kept.put("b", 2, 4)
    assert kept.get("a") == 1
    kept.put("c", 3, 4)
    kept.put("d", 4, 11)
    assert [kept.get(key) for key in "abcd"] == [1, None, 3, None] and len(kept) == 2


def test_pixels_are_those_of_the_image_processor(mini):
    processor = mini[1]
    made = processor.image_processor
    pictures = [Picture.open(io.BytesIO(jpeg(seed, size)["bytes"])).convert("RGB")
                for seed, size in ((0, (64, 48)), (1, (48, 64)), (0, (64, 48)), (0, (48, 64)))]  # fmt: skip
    expected = made(pictures, return_tensors="pt")["pixel_values"]
    calls = []
    once = PixelsOnce(lambda given, **kw: calls.append(len(given)) or made(given, **kw), 1 << 30)
    for _ in range(2):
        assert torch.equal(once(pictures, return_tensors="pt")["pixel_values"], expected)
    assert calls == [1] * 3


def test_a_processor_remembers_once_and_keeps_its_settings(mini, monkeypatch):
    processor = mini[1]
    made = processor.image_processor
    monkeypatch.setattr(processor, "image_processor", made)
    for _ in range(2):
        remember_pixels(processor, 1 << 20)
    assert processor.image_processor.image_processor is made and processor.image_processor.image_mean == made.image_mean
