"""Prompts, token ids and pixels of the authors' evaluation scripts (tests/goldens/eval) through our processor.

The recorded ids need Llama's vocabulary, which is Meta's and not in this repository: it is read from the folder of the
recordings (vocabulary.json.xz), if it is there. Without it, prompts are compared as text, and ids with those of a small
stand-in tokenizer whose pieces before and after the placeholders are encoded one by one.
"""

import json
import lzma
import shutil

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, PreTrainedTokenizerFast, VideoLlavaConfig

from sparsevlm.models import Processor
from tests.goldens.eval import pictures
from tests.goldens.load import files, recording, stem
from tests.hub_layout import MEAN, STD

pytestmark = pytest.mark.recordings
PICTURE = -200  # the authors' id of a picture
PROMPTS, PIXELS = files("eval", "prompts*.json"), files("eval", "pixels*.npz")


def pieces(path) -> list[str] | None:
    """Llama's pieces by id, if they lie beside a recording."""
    file = path.parent / "vocabulary.json.xz"
    return json.loads(lzma.decompress(file.read_bytes())) if file.is_file() else None


def use_vocabulary(folder, pieces: list[str], prepended: str) -> None:
    """Put Llama's vocabulary into a tiny checkpoint, with "▁" put before each text ("always": llama's old conversion)
    or only before the first ("first": a new one). Merges: all divisions of a piece into two, by the ids."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[259:]:
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += sorted((p for p in pairs if p[0] in ids and p[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]]))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"vocab": ids, "merges": merges}
    added = [token for token in content["added_tokens"] if token["id"] >= 259]
    for new, token in enumerate(added, len(pieces)):
        token["id"] = new
    if prepended == "first":
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "added_tokens.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    config |= {f"{t['content'].strip('<>')}_token_index": t["id"] for t in added if t["content"] != "<pad>"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def checkpoints(tiny_llava_folder, tiny_video_llava_folder):
    return {"vicuna_v1": (tiny_llava_folder, LlavaConfig), "llava_v1": (tiny_video_llava_folder, VideoLlavaConfig)}


def asked(processor: Processor, row: dict) -> tuple[str, list[int]]:
    """The prompt of a row as text, its media written as the authors write them, and its token ids."""
    shown = row["ids"].count(PICTURE)
    if shown == 8:
        prompt = processor.render(row["question_text"], 0, 1).replace("<video>", "<image>" * 8)
        inputs = processor(text=row["question_text"], videos=np.zeros((8, 16, 16, 3), np.uint8))
    else:
        prompt = processor.render(row["question_text"], shown)
        images = [np.zeros((16, 16, 3), np.uint8)] * shown
        inputs = processor(text=row["question_text"], images=images or None)
    return prompt, inputs["input_ids"][0].tolist()


def around(ids: list[int], placeholders) -> tuple[list[int], list[int]]:
    """What is before the first placeholder and after the last."""
    at = [i for i, token in enumerate(ids) if token in placeholders]
    return (ids[: at[0]], ids[at[-1] + 1 :]) if at else (ids, [])


@pytest.mark.parametrize("prepended", ["always", "first"])
@pytest.mark.parametrize("path", PROMPTS, ids=stem)
def test_prompts_and_ids(checkpoints, tmp_path, path, prepended):
    recorded, vocabulary = json.loads(path.read_text()), pieces(path)
    processors, stand_ins = {}, {}
    for name, (folder, config) in checkpoints.items():
        copy = shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        if vocabulary:
            use_vocabulary(copy, vocabulary, prepended)
        processors[name] = Processor.from_folder(copy, config.from_pretrained(copy), prompt=name)
        stand_ins[name] = PreTrainedTokenizerFast.from_pretrained(copy).encode
    texts, before, after = [], [], []
    for row in recorded["rows"]:
        name = recorded["generation"][row["benchmark"]]["conv_mode"]
        prompt, ids = asked(processors[name], row)
        ours = around(ids, (processors[name].image_token_id, processors[name].video_token_id))
        if vocabulary:
            theirs = around(row["ids"], (PICTURE,))
        else:
            parts = [part for part in row["prompt"].split("<image>") if part]
            theirs = [stand_ins[name](part, add_special_tokens=False) for part in parts]
            theirs = [1, *theirs[0]], theirs[1] if len(theirs) > 1 else []
        texts += [row["id"]] * (prompt != row["prompt"])
        before += [row["id"]] * (ours[0] != theirs[0])
        after += [row["id"]] * (ours[1] != theirs[1])
    assert recorded["rows"] and (texts, before, after) == ([], [], [])


@pytest.fixture(scope="module")
def processors(checkpoints):
    return {
        name: Processor.from_folder(folder, config.from_pretrained(folder), image_aspect_ratio="pad")
        for name, (folder, config) in checkpoints.items()
    }


@pytest.mark.parametrize("path", PIXELS, ids=stem)
def test_pictures_padded_to_a_square(processors, path):
    meta, recorded = recording(path)
    different = []
    for name, facts in meta["pictures"].items():
        made = processors["vicuna_v1"](text="?", images=pictures.picture(name))["pixel_values"][0].numpy()
        values = np.rint((made * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255)
        assert [*pictures.PICTURES[name]] == facts["size"]
        at, blocks = recorded[f"{name}_at"], made.reshape(3, 12, 28, 12, 28).mean((2, 4))
        near = np.abs(made[tuple(at.T)] - recorded[f"{name}_values"]).max() < 1e-5
        near &= np.abs(blocks - recorded[f"{name}_blocks"]).max() < 1e-5
        near &= abs(made.mean(dtype=np.float64) - facts["mean"]) < 1e-5 and values.min() >= 0 and values.max() <= 255
        different += [] if near else [name]
    assert meta["pictures"] and different == []


@pytest.mark.parametrize("path", PIXELS, ids=stem)
def test_clips(processors, path):
    """As the authors show them; flipped, as they show every second one, is what we leave out."""
    meta, recorded = recording(path)
    different = []
    for name, facts in meta["clips"].items():
        clip = pictures.clip(name.removesuffix("_flipped"))
        made = processors["llava_v1"](text="?", videos=clip)["pixel_values_videos"][0].transpose(0, 1)
        made = (made.flip(-1) if name.endswith("_flipped") else made).numpy()
        near = np.abs(made[tuple(recorded[f"{name}_at"].T)] - recorded[f"{name}_values"]).max() < 1e-5
        near &= abs(made.mean(dtype=np.float64) - facts["mean"]) < 1e-5
        if (blocks := recorded.get(f"{name}_blocks")) is not None:
            near &= np.abs(made.reshape(3, 8, 8, 28, 8, 28).mean((3, 5)) - blocks).max() < 1e-5
        different += [] if near else [name]
    assert meta["clips"] and different == []


@pytest.mark.parametrize("path", PIXELS, ids=stem)
def test_which_frames(processors, path):
    meta, _ = recording(path)
    found = {}
    for length in meta["frames"]:
        made = processors["llava_v1"](text="?", videos=pictures.counted(int(length)))["pixel_values_videos"][0]
        colours = (made[:, :, 0, 0] * torch.tensor(STD) + torch.tensor(MEAN)).mul(255).round().int()
        found[length] = (colours[:, 0] // 16 + 16 * (colours[:, 1] // 8)).tolist()
    assert found == meta["frames"] != {}
