"""Tiny random models of the families whose number of visual tokens depends on the picture, and prompts for them."""

from __future__ import annotations

import torch
import transformers as hf

from tests.tiny import DTYPE, PAD, _finish, pad, text_config

IMAGE, VIDEO, START, END, VOCAB = 94, 95, 92, 93, 100
LAYERS = 6
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NAMES = (*QWEN, "llava_next", "llava_onevision", "internvl")
_TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
_TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28)
_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
#: Sizes of pictures in patches before 2 x 2 of them are merged (Qwen), and in pixels (the others).
GRIDS = {"A": (1, 8, 6), "B": (1, 8, 12), "V": (3, 4, 6), "W": (3, 8, 4)}
SIZES = {"A": (28, 56), "B": (56, 40)}
TILES = {"A": 3, "B": 5}  # of InternVL, whose tiles are not in the model's inputs
FRAMES = {"V": 3, "W": 3}
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]
LAYOUTS = {
    "one": [[5, "A", 9]],
    "batch": [[5, "A", 9], [3, "B", 14], [11]],  # unequal pictures, and no picture
    "two": [[4, "A", 3, "B", 8]],
    "video": [[4, "V", 7]],
    "mixed": [[4, "A", 2, "V", 7], [3, "W", 5]],
}
HAS_VIDEO = (*QWEN, "llava_onevision")


def layouts(name: str) -> list[str]:
    return [kind for kind in LAYOUTS if name in HAS_VIDEO or kind not in ("video", "mixed")]


def tiny(name: str, impl: str = "sdpa", dtype=None, seed: int = 0, **text):
    """A model of six layers with grouped queries; Qwen3-VL adds features after three of them."""
    return _finish(*_class_and_config(name, text), impl, dtype or DTYPE[impl], seed)


def _class_and_config(name: str, text: dict):
    if name in QWEN:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        text = {**_TEXT, "rope_parameters": rope, **text}
        vision = dict(depth=4, num_heads=2, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
        if name == "qwen2_vl":
            config = hf.Qwen2VLConfig
            vision |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2, patch_size=14)
        elif name == "qwen2_5_vl":
            config = hf.Qwen2_5_VLConfig
            vision |= dict(hidden_size=32, out_hidden_size=64, intermediate_size=48, patch_size=14, window_size=56)
            vision |= dict(fullatt_block_indexes=[1, 3], tokens_per_second=2)
        else:
            config = hf.Qwen3VLConfig
            text["head_dim"] = 16
            vision |= dict(hidden_size=32, out_hidden_size=64, intermediate_size=48, patch_size=16)
            vision |= dict(deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64)
        model = getattr(hf, config.__name__.removesuffix("Config") + "ForConditionalGeneration")
        return model, config(text_config=text, vision_config=vision, **_IDS)
    if name == "internvl":
        vision = hf.InternVLVisionConfig(**{**_TOWER, "image_size": [28, 28], "patch_size": [7, 7]})
        text = text_config("qwen2", LAYERS, **text)
        config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4)
        return hf.InternVLForConditionalGeneration, config
    shared = dict(
        image_token_index=IMAGE, image_grid_pinpoints=_PINPOINTS, text_config=text_config("qwen2", LAYERS, **text)
    )
    if name == "llava_next":
        vision = hf.CLIPVisionConfig(**_TOWER, patch_size=7, projection_dim=32)
        return hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig(vision_config=vision, **shared)
    vision = hf.SiglipVisionConfig(**_TOWER, patch_size=7, vision_use_head=False)
    config = hf.LlavaOnevisionConfig(vision_config=vision, video_token_index=VIDEO, **shared)
    return hf.LlavaOnevisionForConditionalGeneration, config


def inputs(name: str, kind: str, model, seed: int = 1) -> tuple[dict, list[list[int]]]:
    """What the family's processor would return for one of LAYOUTS, with random pixels; and the unpadded rows."""
    return of_rows(name, LAYOUTS[kind], model, seed)


def of_rows(name: str, layout: list[list], model, seed: int = 1) -> tuple[dict, list[list[int]]]:
    torch.manual_seed(seed)
    pictures = [p for parts in layout for p in parts if p in ("A", "B")]
    videos = [p for parts in layout for p in parts if p in ("V", "W")]
    x = _pixels(name, pictures, videos, model)
    rows = [[i for part in parts for i in _ids(name, part, model)] for parts in layout]
    ids, mask = pad(rows)
    x |= {"input_ids": ids, "attention_mask": mask}
    if name in QWEN:
        x["mm_token_type_ids"] = (ids == IMAGE) + 2 * (ids == VIDEO)
    return x, rows


def _ids(name: str, part, model) -> list[int]:
    if isinstance(part, int):
        return torch.randint(3, 90, (part,)).tolist()
    if name in QWEN:
        t, h, w = GRIDS[part]
        token = IMAGE if part in "AB" else VIDEO
        if name == "qwen3_vl" and token == VIDEO:  # a time stamp before each frame
            frame = [30, 31, START, *[VIDEO] * (h * w // 4), END]
            return frame * t
        return [START, *[token] * (t * h * w // 4), END]
    if part in "VW":
        return [VIDEO] * (FRAMES[part] * 4 + 1)  # 4 x 4 patches, pooled 2 x 2
    if name == "internvl":
        return [IMAGE] * (4 * TILES[part])
    one = _pixels(name, [part], [], model)
    features = model.model.get_image_features(**one, return_dict=True).pooler_output
    return [IMAGE] * len(features[0])


def _pixels(name: str, pictures: list[str], videos: list[str], model) -> dict:
    def noise(*shape):
        return torch.randn(*shape, dtype=model.dtype)

    if name in QWEN:
        patch = model.config.vision_config.patch_size
        out = {}
        for key, grid, parts in (
            ("pixel_values", "image_grid_thw", pictures),
            ("pixel_values_videos", "video_grid_thw", videos),
        ):
            if parts:
                out[grid] = torch.tensor([GRIDS[p] for p in parts])
                out[key] = noise(int(out[grid].prod(1).sum()), 3 * 2 * patch**2)
        if name == "qwen2_5_vl" and videos:
            out["second_per_grid_ts"] = torch.full((len(videos),), 1.5)
        return out
    if name == "internvl":
        return {"pixel_values": noise(sum(TILES[p] for p in pictures), 3, 28, 28)} if pictures else {}
    out = {}
    if pictures:
        out = {
            "image_sizes": torch.tensor([SIZES[p] for p in pictures]),
            "pixel_values": noise(len(pictures), 5, 3, 28, 28),
        }
    if videos:
        frames = max(FRAMES[p] for p in videos)
        assert all(FRAMES[p] == frames for p in videos), "this family stacks videos of one length"
        out["pixel_values_videos"] = noise(len(videos), frames, 3, 28, 28)
    return out
