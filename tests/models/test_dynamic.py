"""Checkpoints whose visual tokens depend on the picture: loading, prompts, placeholders, limits of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import sparsevlm
from sparsevlm.models import Processor, n_visual_tokens
from sparsevlm.models.checkpoint import FAMILIES, read_config
from sparsevlm.models.dynamic import KINDS
from sparsevlm.models.loading import read_processor
from sparsevlm.runtime.families import RECORDS
from tests import hub_families

NAMES = tuple(KINDS)
SIZES = [(200, 120), (60, 90), (100, 300)]  # width, height


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.RandomState(width).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("hub"), {}

    def get(name: str):
        if name not in made:
            made[name] = hub_families.save(name, root / name)
        return made[name]

    return get


def processor_of(path, **options) -> Processor:
    return read_processor(path, read_config(path), **options)


def test_every_family_can_be_loaded():
    assert {*FAMILIES} == {*RECORDS} and {*NAMES} == {k for k, r in RECORDS.items() if not r.grid}


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_unequal_pictures(name, folder):
    """The model itself counts placeholders against features, and refuses another number."""
    model, processor = sparsevlm.load(folder(name))
    pictures = [picture(*size) for size in SIZES]
    questions = ["what is it?", "no picture", "this <image> or that <image>, which?"]
    x = processor(questions, images=[pictures[0], None, pictures[1:]])
    counts = (x["input_ids"] == processor.image_token_id).sum(1).tolist()
    with torch.no_grad(), sparsevlm.build("sparsevlm", budget=0.3)(model) as trace:
        model.generate(**x, max_new_tokens=2, do_sample=False)
    assert trace.prefills[0].n_visual == counts and counts[1] == 0 and counts[0] != counts[2] > 0
    for b, count in enumerate(counts):  # a mean over layers: to half a token
        assert trace.prefills[0].leaving[b] == pytest.approx(int(0.3 * count + 0.5), abs=0.5)
    for b, media in enumerate([[pictures[0]], None, pictures[1:]]):
        alone = processor(questions[b], images=media)["input_ids"][0].tolist()
        padded = x["input_ids"][b].tolist()
        assert padded[len(padded) - len(alone) :] == alone
        assert not x["attention_mask"][b, : len(padded) - len(alone)].any()


@pytest.mark.parametrize("name", NAMES)
def test_pictures_stand_where_the_question_has_them(name, folder):
    processor = processor_of(folder(name))
    first, placed = processor.render("before  after", 1), processor.render("before <image> after", 1)
    assert placed.index("before") < placed.index("after") and first.index("user") < first.index("before")
    assert len(first.split("before")[0]) > len(placed.split("before")[0])
    assert placed.rstrip().endswith("assistant")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert [processor.render(talk, 1).index(x) for x in ("a<|im_end|>", "b<|im_end|>", "c<|im_end|>")] == sorted(
        processor.render(talk, 1).index(x) for x in ("a<|im_end|>", "b<|im_end|>", "c<|im_end|>")
    )
    with pytest.raises(ValueError, match="a question has 2 <image> but 1 images"):
        processor.render("<image> <image>", 1)


@pytest.mark.parametrize("name,side", [("qwen2_vl", 28), ("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_limits_of_pixels(name, side, folder):
    def tokens(size, **limits):
        processor = processor_of(folder(name), **limits)
        return int((processor("?", images=picture(*size))["input_ids"] == processor.image_token_id).sum())

    low, high = 16 * side**2, 40 * side**2
    for size in SIZES:
        count = tokens(size, min_pixels=low, max_pixels=high)
        assert 16 <= count <= 40
        wide, tall = (round(x / side) for x in size)
        if 16 <= wide * tall <= 40:  # inside the limits a picture is rounded to whole tokens only
            assert count == wide * tall
        assert tokens(size, max_pixels=9 * side**2, min_pixels=side**2) <= 9
    assert tokens((90, 90), min_pixels=64 * side**2, max_pixels=64 * side**2) == 64
    processor = processor_of(folder(name), min_pixels=low)
    assert processor.min_pixels == low and processor.max_pixels == (16777216 if name == "qwen3_vl" else 12845056)


def test_limits_of_tiles(folder):
    def tiles(**limits):
        processor = processor_of(folder("internvl"), **limits)
        return len(processor("?", images=picture(300, 200))["pixel_values"]), processor.max_pixels

    assert tiles()[1] == 12 * 56**2 and tiles(max_pixels=2 * 56**2 + 5) == (3, 2 * 56**2)  # two and a thumbnail
    assert tiles(max_pixels=56**2)[0] == 1
    with pytest.raises(ValueError, match="max_pixels 100 is below one tile. Use at least 3136"):
        tiles(max_pixels=100)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("qwen2_vl", {"prompt": "vicuna_v1"}, "takes prompt='hub'"),
        ("qwen2_vl", {"image_aspect_ratio": "pad"}, "keeps the shape of pictures"),
        ("qwen2_vl", {"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is above max_pixels 8"),
        ("qwen2_vl", {"min_pixels": 0}, "min_pixels 0 is no number of pixels"),
        ("llava_next", {"max_pixels": 99999}, "takes no max_pixels=99999: its pictures are cut into the crops"),
        ("llava_onevision", {"min_pixels": 9}, "takes no min_pixels=9"),
    ],
)
def test_options_that_a_family_does_not_take(name, options, message, folder):
    with pytest.raises(ValueError, match=message):
        sparsevlm.load(folder(name), **options)


def test_llava_takes_no_limits():
    with pytest.raises(ValueError, match="all pictures of a model of type 'llava' have 168 x 168"):
        sparsevlm.load("mini", max_pixels=5000)
    with pytest.raises(ValueError, match="takes square pictures. Use crop or pad"):
        sparsevlm.load("mini", image_aspect_ratio="native")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_prepared(name, folder):
    processor = processor_of(folder(name))
    with pytest.raises(ValueError, match="videos are not prepared"):
        processor("?", videos=[np.zeros((4, 30, 30, 3), np.uint8)])
    spelt = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    if spelt != "<image>":  # which in a question says where a picture goes
        with pytest.raises(ValueError, match="Leave it out of the question"):
            processor(f"what is {spelt}?", images=picture(60, 60))
    with pytest.raises(ValueError, match="depends on the picture"):
        n_visual_tokens(read_config(folder(name)))
