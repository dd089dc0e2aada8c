"""The processor against independent restatements and against transformers' own processors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoTokenizer, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast, VideoLlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import sparsevlm
from sparsevlm.models import Processor
from sparsevlm.models.media import is_video, sample_frames
from tests.hub_layout import MEAN, STD

QUESTIONS = ["Is there a cat in the image?", "What?", "red\nor blue, 3 words: ünïcödé"]
SYSTEM = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.",
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def processor_of(folder, **options) -> Processor:
    config = json.loads((folder / "config.json").read_text())
    kind = LlavaConfig if config["model_type"] == "llava" else VideoLlavaConfig
    return Processor.from_folder(folder, kind.from_pretrained(folder), **options)


@pytest.fixture(scope="module")
def llava(tiny_llava_folder):
    return processor_of(tiny_llava_folder)


@pytest.fixture(scope="module")
def video_llava(tiny_video_llava_folder):
    return processor_of(tiny_video_llava_folder)


@pytest.fixture(scope="module")
def reference(tiny_llava_folder):
    """transformers' processor, with Pillow."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(tiny_llava_folder),
        tokenizer=AutoTokenizer.from_pretrained(tiny_llava_folder, padding_side="left"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=json.loads((tiny_llava_folder / "chat_template.json").read_text())["chat_template"],
    )


def same(inputs, others) -> bool:
    return inputs.keys() == others.keys() and all(torch.equal(inputs[k], others[k]) for k in inputs)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_hub_prompt_text(llava, video_llava):
    assert llava.render("What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    assert llava.render("What?") == "USER: What? ASSISTANT:"
    assert llava.render("What?", 2) == "USER: <image>\n<image>\nWhat? ASSISTANT:"
    assert video_llava.render("What?", 1, 1) == "USER: <image>\n<video>\nWhat? ASSISTANT:"


@pytest.mark.parametrize(("prompt", "system"), SYSTEM.items())
def test_text_of_the_authors_conversations(tiny_llava_folder, prompt, system):
    processor = processor_of(tiny_llava_folder, prompt=prompt)
    assert processor.render("What?", 1) == f"{system} USER: <image>\nWhat? ASSISTANT:"
    assert processor.render("What?") == f"{system} USER: What? ASSISTANT:"
    turns = [("user", "What?"), ("assistant", "A cat."), ("user", "Sure?")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    expected = f"{system} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert processor.render(conversation, 1) == expected


@pytest.mark.parametrize("prompt", ["hub", *SYSTEM])
def test_token_ids(tiny_llava_folder, prompt):
    """The ids written out: start, text before the image, 576 placeholders, text after it."""
    processor = processor_of(tiny_llava_folder, prompt=prompt)
    ids = processor(text="What?", images=picture(30, 20))["input_ids"][0].tolist()
    encode = PreTrainedTokenizerFast.from_pretrained(tiny_llava_folder).encode
    before = "USER: " if prompt == "hub" else f"{SYSTEM[prompt]} USER: "
    after = encode("\nWhat? ASSISTANT:", add_special_tokens=False)
    assert ids == [1, *encode(before, add_special_tokens=False), *[448] * 576, *after]
    assert processor.image_token_id == 448 and processor.video_token_id is None
    assert processor.decode([1, *after, 2]) == "\nWhat? ASSISTANT:"
    assert processor.batch_decode([[1, *after, 2]], skip_special_tokens=False) == ["<s> \nWhat? ASSISTANT:</s>"]


@pytest.mark.parametrize("prepended", ["always", "first"])
def test_texts_around_a_picture_are_tokenized_by_themselves(tiny_llava_folder, tmp_path, prepended):
    """In the authors' conversations each begins with the mark of a word ("▁"), whether or not the tokenizer would put
    one behind a placeholder: tokenizers on the hub differ in that."""
    folder = shutil.copytree(tiny_llava_folder, tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepended, "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    mark, line_break = (content["model"]["vocab"][piece] for piece in ("▁", "<0x0A>"))
    config = LlavaConfig.from_pretrained(folder)
    parts = PreTrainedTokenizerFast.from_pretrained(folder), processor_of(tiny_llava_folder).image_processor, config
    ids = Processor(*parts, prompt="vicuna_v1")(text="What?", images=picture(9, 9))["input_ids"][0].tolist()
    end = len(ids) - ids[::-1].index(448)
    assert ids[end : end + 2] == [mark, line_break] and ids[:2] == [1, content["model"]["vocab"]["▁A"]]
    hub = Processor(*parts, chat_template="<image>\nWhat?")(text="What?", images=picture(9, 9))["input_ids"][0].tolist()
    behind = hub[len(hub) - hub[::-1].index(448)]  # in the checkpoint's template its tokenizer decides
    assert behind == (mark if prepended == "always" else line_break)


def test_same_as_llava_processor(llava, reference):
    for question in QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = reference.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        others = reference(images=[picture(400, 300)], text=prompt, return_tensors="pt")
        assert same(llava(text=question, images=picture(400, 300)), others)


def test_batch_same_as_llava_processor(llava, reference):
    pictures = [picture(400, 300, 1), picture(50, 400, 2), picture(336, 336, 3)]
    prompts = [llava.render(q, 1) for q in QUESTIONS]
    others = reference(images=pictures, text=prompts, padding=True, return_tensors="pt")
    assert same(llava(text=QUESTIONS, images=pictures), others)


def test_conversation_same_as_llava_processor(llava, reference):
    turns = [("user", "What?"), ("assistant", "A cat."), ("user", "Sure?")]
    listed = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    listed[0]["content"].insert(0, {"type": "image"})
    prompt = reference.apply_chat_template(listed, add_generation_prompt=True)
    others = reference(images=[picture(40, 30)], text=prompt, return_tensors="pt")
    conversation = [{"role": role, "content": text} for role, text in turns]
    assert same(llava(text=conversation, images=picture(40, 30)), others)
    assert same(llava(text=[conversation], images=[picture(40, 30)]), others)


def test_images_go_where_the_text_says(llava):
    assert llava.render("Compare <image> with <image>.", 2) == "USER: Compare <image> with <image>. ASSISTANT:"
    assert llava.render("<image>\nWhat?", 1) == llava.render("What?", 1)


def test_template_in_any_of_its_files(tiny_llava_folder, tmp_path):
    folder = shutil.copytree(tiny_llava_folder, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}NEW <image>{% endfor %}")
    assert processor_of(folder).render("What?", 1) == "NEW <image>"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="no chat template; use prompt='vicuna_v1'"):
        processor_of(folder)
    assert processor_of(folder, prompt="vicuna_v1").render("What?").endswith("USER: What? ASSISTANT:")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "OLD"}))
    assert processor_of(folder).render("What?") == "OLD"
    with pytest.raises(ValueError, match="template places 0 <image> for 1 images"):
        processor_of(folder).render("What?", 1)


def test_template_that_writes_the_start_token_itself(tiny_llava_folder, tmp_path, llava):
    folder = shutil.copytree(tiny_llava_folder, tmp_path / "copy")
    template = llava.chat_template
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    ids = processor_of(folder)(text="What?")["input_ids"]
    assert ids[0, 0] == 1 and (ids == 1).sum() == 1


@pytest.mark.parametrize("prompt", SYSTEM)
def test_vocabulary_too_small_for_the_authors_conversations(prompt):
    with pytest.raises(ValueError, match=f"cannot spell the prompt '{prompt}'; use prompt='hub'"):
        sparsevlm.load("mini", prompt=prompt)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prompt": "vicuna_v1", "image_aspect_ratio": "pad"}])
def test_batch_equals_singles(tiny_llava_folder, options):
    processor = processor_of(tiny_llava_folder, **options)
    images = [[picture(60, 40)], None, [picture(30, 40, 1), picture(336, 336, 2)]]
    batch = processor(text=QUESTIONS, images=images)
    singles = [processor(text=q, images=i) for q, i in zip(QUESTIONS, images, strict=True)]
    assert torch.equal(batch["pixel_values"], torch.cat([s["pixel_values"] for s in singles if "pixel_values" in s]))
    width = batch["input_ids"].shape[1]
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
        padding = width - single["input_ids"].shape[1]
        assert torch.equal(row[padding:], single["input_ids"][0])
        assert (row[:padding] == 449).all()  # <pad>
        assert mask.tolist() == [0] * padding + [1] * (width - padding)
    assert (batch["input_ids"] == 448).sum(1).tolist() == [576, 0, 2 * 576]


def test_text_alone(llava):
    assert set(llava(text=["What?", "Why not?"])) == {"input_ids", "attention_mask"}


# --- pixels -----------------------------------------------------------------------------------------------------------


def restated_pixels(image: Image.Image, size: int, pad: bool) -> np.ndarray:
    """LLaVA's own steps: expand2square with the mean colour (pad), scale the short side, crop the centre, normalise."""
    if pad:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    width, height = image.size
    scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    pixels = np.asarray(image.resize(scaled, Image.BICUBIC), np.float64)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    pixels = pixels[top : top + size, left : left + size] / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("ratio", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (336, 336), (20, 31), (1000, 7)])
def test_pixels(tiny_llava_folder, ratio, shape):
    processor = processor_of(tiny_llava_folder, image_aspect_ratio=ratio)
    made = processor(text="What?", images=picture(*shape))["pixel_values"]
    assert made.shape == (1, 3, 336, 336) and made.dtype == torch.float32
    np.testing.assert_allclose(made[0].numpy(), restated_pixels(picture(*shape), 336, ratio == "pad"), atol=1e-5)


def test_kinds_of_pictures(llava, tmp_path):
    rgb = picture(60, 40)
    rgb.save(tmp_path / "picture.png")
    expected = llava(text="What?", images=rgb)
    for image in (np.asarray(rgb), tmp_path / "picture.png", str(tmp_path / "picture.png"), rgb.convert("RGBA")):
        assert same(llava(text="What?", images=image), expected)
    grey = llava(text="What?", images=rgb.convert("L"))["pixel_values"]
    channels = grey[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert torch.allclose(channels[0], channels[2], atol=1e-6)


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "taken"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, [0, 0, 0, 0, 1, 1, 1, 2]),
        (1, [0] * 8),
        (100, [0, 14, 28, 42, 56, 70, 84, 99]),
    ],
)
def test_frames_taken(frames, taken):
    video = np.stack([np.full((4, 5, 3), i, np.uint8) for i in range(frames)])
    assert [np.asarray(f)[0, 0, 0] for f in sample_frames(video, 8, "video")] == taken
    assert [np.asarray(f)[0, 0, 0] for f in sample_frames(list(video), 8, "video")] == taken


def restated_frame(frame: np.ndarray, size: int) -> np.ndarray:
    """Video-LLaVA's steps on [H, W, 3]: normalise; shorter side to `size`, each pixel from its two neighbours per
    direction; middle square."""

    def weights(old: int, new: int) -> np.ndarray:
        place = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0)
        low = np.floor(place).astype(int)
        out = np.zeros((new, old))
        out[np.arange(new), low] = 1 - (place - low)
        out[np.arange(new), np.minimum(low + 1, old - 1)] += place - low
        return out

    values = (frame / 255 - MEAN) / STD
    height, width = frame.shape[:2]
    new = (height * size // width, size) if width < height else (size, width * size // height)
    values = weights(height, new[0]) @ values.transpose(2, 0, 1) @ weights(width, new[1]).T
    top, left = (int(round((side - size) / 2.0)) for side in new)
    return values[:, top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(240, 320), (320, 180), (72, 96), (224, 224), (224, 375)])
def test_video_pixels(video_llava, tiny_video_llava_folder, shape):
    video = np.random.RandomState(0).randint(0, 256, (8, *shape, 3), dtype=np.uint8)
    made = video_llava(text="What?", videos=video)["pixel_values_videos"]
    assert made.shape == (1, 8, 3, 224, 224) and made.dtype == torch.float32
    for frame, pixels in zip(video, made[0].numpy(), strict=True):
        np.testing.assert_allclose(pixels, restated_frame(frame, 224), atol=2e-4)
    padded = processor_of(tiny_video_llava_folder, image_aspect_ratio="pad")(text="What?", videos=video)
    assert torch.equal(padded["pixel_values_videos"], made)  # that is for pictures


def test_video_inputs(video_llava):
    video = np.random.RandomState(0).randint(0, 256, (20, 30, 50, 3), dtype=np.uint8)
    inputs = video_llava(text="What?", videos=video)
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, 224, 224)
    third = restated_frame(video[np.linspace(0, 19, 8, dtype=int)[2]], 224)
    np.testing.assert_allclose(inputs["pixel_values_videos"][0, 2], third, atol=2e-4)
    assert (inputs["input_ids"] == video_llava.video_token_id).sum() == 8 * 257
    frames = [Image.fromarray(f) for f in video]
    for same_video in (frames, [video], [frames]):
        assert same(video_llava(text="What?", videos=same_video), inputs)
    batch = video_llava(text=["What?", "Why?"], videos=[frames, [video, frames[:2]]], images=[None, frames[0]])
    assert batch["pixel_values_videos"].shape == (3, 8, 3, 224, 224)
    assert (batch["input_ids"] == video_llava.video_token_id).sum(1).tolist() == [2056, 2 * 2056]
    assert (batch["input_ids"] == video_llava.image_token_id).sum(1).tolist() == [0, 256]


def test_same_as_video_llava_processor(video_llava, tiny_video_llava_folder):
    pytest.importorskip("torchvision")
    from transformers import VideoLlavaProcessor

    reference = VideoLlavaProcessor.from_pretrained(tiny_video_llava_folder)
    video = np.random.RandomState(0).randint(0, 256, (8, 224, 224, 3), dtype=np.uint8)  # nothing to be scaled
    others = reference(text="USER: <video>\nWhat? ASSISTANT:", videos=[video], return_tensors="pt")
    inputs = video_llava(text="What?", videos=video)
    assert torch.equal(inputs["input_ids"], others["input_ids"])
    torch.testing.assert_close(inputs["pixel_values_videos"], others["pixel_values_videos"], rtol=0, atol=1e-5)


def test_is_video():
    frame = np.zeros((4, 5, 3), np.uint8)
    assert all(map(is_video, [np.stack([frame]), [frame], (frame, frame), [Image.new("RGB", (4, 5))], ["frame.png"]]))
    assert not any(map(is_video, [[np.stack([frame])], [[frame]], [], [None], frame]))


# --- errors -----------------------------------------------------------------------------------------------------------


def truncated(tmp_path):
    path = tmp_path / "cut.jpg"
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize("lenient", [False, True])
def test_corrupt_pictures_are_named(llava, video_llava, tmp_path, monkeypatch, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # importing lmms-eval makes it True
    good, path = picture(30, 30), truncated(tmp_path)
    for bad in (path, Image.open(path)):
        with pytest.raises(
            ValueError, match=r"image 1 of question 1 \(.*cut.jpg\) cannot be decoded .*leave the sample"
        ):
            llava(text=["a", "b"], images=[good, [good, bad]])
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"image 0 of question 0 \(.*text.png\) cannot be opened"):
        llava(text="a", images=tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"image 0 of question 0 \(nowhere.png\) cannot be opened"):
        llava(text="a", images="nowhere.png")
    with pytest.raises(ValueError, match=r"frame 1 of video 0 of question 0 \(.*cut.jpg\) cannot be decoded"):
        video_llava(text="a", videos=[good, path])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 30, 30), np.uint8), r"array \[H, W, 3\] of uint8, not \[3, 30, 30\] of uint8"),
        (np.zeros((30, 30, 3), np.float32), "not .* of float32"),
        (np.zeros((0, 30, 3), np.uint8), "is empty"),
        (Image.new("RGB", (0, 5)), "is 0 x 5 pixels"),
        (Image.new("RGB", (3000, 3)), "is 3000 x 3 pixels; .*factor of 200"),
        (7, "must be a PIL image, a file or an array .*not int"),
    ],
)
def test_unusable_pictures(llava, image, message):
    with pytest.raises(ValueError, match="image 0 of question 0.*" + message):
        llava(text="a", images=image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": []}, "no question given"),
        ({"text": ["a", "b"], "images": [picture(9, 9)]}, "2 questions but images for 1"),
        ({"text": "<image> and <image>", "images": picture(9, 9)}, "2 <image> but 1 images; it begins '<image> and"),
        ({"text": "<image>"}, "1 <image> but 0 images"),
        ({"text": "<image>", "images": [picture(9, 9)] * 2}, "1 <image> but 2 images"),
        ({"text": "a", "videos": np.zeros((8, 9, 9, 3), np.uint8)}, "takes no videos; use a Video-LLaVA checkpoint"),
        ({"text": [7]}, "a question is a string or a list of"),
        ({"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with the user's"),
    ],
)
def test_calls_that_do_not_fit(llava, arguments, message):
    with pytest.raises(ValueError, match=message):
        llava(**arguments)


def test_empty_video(video_llava):
    with pytest.raises(ValueError, match="video 0 of question 0 has no frames"):
        video_llava(text="a", videos=np.zeros((0, 9, 9, 3), np.uint8))


def damage(folder, tmp_path, file, **changes):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps(content))
    return copy


def test_parts_of_different_checkpoints(tiny_llava_folder, tmp_path):
    copy = damage(tiny_llava_folder, tmp_path, "config.json", image_token_index=300)
    with pytest.raises(ValueError, match="<image> is 448 in the tokenizer and 300 in config.json"):
        processor_of(copy)
    shutil.rmtree(copy)
    size = {"height": 224, "width": 224}
    copy = damage(tiny_llava_folder, tmp_path, "preprocessor_config.json", crop_size=size)
    with pytest.raises(ValueError, match=r"makes \[224, 224\] pixels, the model takes \[336, 336\]"):
        processor_of(copy)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer.json", "no tokenizer .tokenizer.json or tokenizer.model."),
        ("preprocessor_config.json", "no image processor settings .preprocessor_config.json."),
    ],
)
def test_missing_files(tiny_llava_folder, tmp_path, file, message):
    copy = shutil.copytree(tiny_llava_folder, tmp_path / "copy")
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=message + ".*download the checkpoint again"):
        processor_of(copy)


def test_files_as_transformers_5_saves_them(tiny_llava_folder, tmp_path, llava, reference):
    shutil.copy(tiny_llava_folder / "config.json", tmp_path)
    reference.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert same(
        processor_of(tmp_path)(text="What?", images=picture(40, 30)), llava(text="What?", images=picture(40, 30))
    )
