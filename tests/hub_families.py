"""Tiny checkpoints of the families whose visual tokens depend on the picture, in the layout of the hub's.

As in `hub_layout`: widths, depths and vocabulary are scaled down; config keys, files and weight names are the hub's,
old ones included (Qwen2-VL and Qwen2.5-VL keep the text model's settings at the top of config.json).
"""

from __future__ import annotations

from pathlib import Path

import sparsevlm  # noqa: F401  # isort: skip  - before transformers: makes it importable beside any torchvision

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.hub_layout import _CORPUS, MEAN, STD, _dump, _write_shards

TEXT_TOKENS, VOCABULARY = 448, 512
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32768, "num_attention_heads": 4,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "vocab_size": VOCABULARY,
}  # fmt: skip
_CHAT = "{%% for message in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
_PIECES = (
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}IMAGE{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}"
)
_QWEN = _CHAT % (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n" + _PIECES + "<|im_end|>\n",
    "<|im_start|>assistant\n",
)
_QWEN_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_PINPOINTS = [[56, 112], [112, 56], [112, 112]]
_PATCHES = {"min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2, "patch_size": 14, "temporal_patch_size": 2}


def save(name: str, folder: Path) -> Path:
    """Write the checkpoint of a family into a new folder."""
    folder.mkdir(parents=True)
    made_for, config, tokens, template, images, rename = _SPECS[name]()
    ids = _save_tokenizer(folder, tokens, name)
    config = {"architectures": [made_for], "model_type": name, "torch_dtype": "bfloat16", **config(ids)}
    _dump(folder / "config.json", config)
    _dump(folder / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD, **images})
    _dump(folder / "chat_template.json", {"chat_template": template})
    _dump(folder / "generation_config.json", {"eos_token_id": ids[tokens[2]], "pad_token_id": ids[tokens[0]]})
    cls = getattr(transformers, made_for)
    torch.manual_seed(0)
    model = cls(cls.config_class.from_pretrained(folder))
    tied = config.get("tie_word_embeddings")
    weights = {rename(k): v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    _write_shards(folder, weights, 2, torch.bfloat16)
    return folder


def _qwen_ids(ids: dict[str, int]) -> dict:
    names = ("vision_start", "vision_end", "image", "video")
    pads = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    return {f"{n}_token_id": ids[pads.get(n, f"<|{n}|>")] for n in names} | {"bos_token_id": ids["<|endoftext|>"]}


def _qwen(version: str, vision: dict):
    made_for = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}

    def config(ids):
        return {
            **_TEXT, **_qwen_ids(ids), "eos_token_id": ids["<|im_end|>"], "tie_word_embeddings": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "use_sliding_window": False,
            "sliding_window": 32768, "max_window_layers": 5, "vision_config": {
                "in_chans": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
                "temporal_patch_size": 2, **vision,
            },
        }  # fmt: skip

    def rename(name: str) -> str:
        return name.removeprefix("model.") if name.startswith("model.visual.") else name.replace(".language_model", "")

    images = {"image_processor_type": "Qwen2VLImageProcessor", **_PATCHES}
    template = _QWEN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return made_for[version], config, _QWEN_TOKENS, template, images, rename


def _qwen3():
    def config(ids):
        text = {
            **_TEXT, "model_type": "qwen3_vl_text", "head_dim": 8, "eos_token_id": ids["<|im_end|>"],
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"},
        }  # fmt: skip
        vision = {
            "deepstack_visual_indexes": [0, 1, 2], "depth": 4, "hidden_size": 32, "in_channels": 3, "num_heads": 2,
            "intermediate_size": 48, "model_type": "qwen3_vl", "num_position_embeddings": 64, "out_hidden_size": 32,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        return {**_qwen_ids(ids), "text_config": text, "vision_config": vision, "tie_word_embeddings": False}

    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "merge_size": 2, "patch_size": 16, "temporal_patch_size": 2,
    }  # fmt: skip
    template = _QWEN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return "Qwen3VLForConditionalGeneration", config, _QWEN_TOKENS, template, images, lambda name: name


def _llava(name: str):
    next_one = name == "llava_next"
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip

    def config(ids):
        vision = {**tower, "model_type": "clip_vision_model" if next_one else "siglip_vision_model"}
        vision |= {"projection_dim": 16} if next_one else {"vision_use_head": False}
        text = {**_TEXT, "model_type": "llama" if next_one else "qwen2", "eos_token_id": ids["<|im_end|>"]}
        out = {
            "image_grid_pinpoints": _PINPOINTS, "image_token_index": ids["<image>"], "projector_hidden_act": "gelu",
            "text_config": text, "vision_config": vision, "tie_word_embeddings": False,
        }  # fmt: skip
        if next_one:
            return {**out, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        more = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        return {**out, **more, "video_token_index": ids["<video>"], "vision_aspect_ratio": "anyres_max_9"}

    def rename(key: str) -> str:
        key = key.removeprefix("model.")
        if key.startswith("lm_head."):
            return f"language_model.{key}"
        key = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
        return key.replace("language_model.", "language_model.model.", 1)

    side = {"height": 56, "width": 56}
    images = {"image_grid_pinpoints": _PINPOINTS, "resample": 3}
    if next_one:
        images |= {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 56}, "crop_size": side}
    else:
        images |= {"image_processor_type": "LlavaOnevisionImageProcessor", "size": side}
    kind = "LlavaNext" if next_one else "LlavaOnevision"
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    return f"{kind}ForConditionalGeneration", config, tokens, _QWEN.replace("IMAGE", "<image>\n"), images, rename


def _internvl():
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]

    def config(ids):
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3,
            "image_size": [56, 56], "patch_size": [14, 14], "model_type": "internvl_vision",
        }  # fmt: skip
        text = {**_TEXT, "model_type": "qwen2", "eos_token_id": ids["<|im_end|>"]}
        return {
            "downsample_ratio": 0.5, "image_seq_length": 4, "image_token_id": ids["<IMG_CONTEXT>"],
            "projector_hidden_act": "gelu", "text_config": text, "vision_config": vision,
            "tie_word_embeddings": False, "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        }  # fmt: skip

    def rename(key: str) -> str:
        key = key.removeprefix("model.")
        return (
            f"language_model.{key}"
            if key.startswith("lm_head.")
            else key.replace("language_model.", "language_model.model.", 1)
        )

    images = {
        "image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 56, "width": 56}, "min_patches": 1,
        "max_patches": 12, "crop_to_patches": False, "resample": 3,
    }  # fmt: skip
    return "InternVLForConditionalGeneration", config, tokens, _QWEN.replace("IMAGE", "<IMG_CONTEXT>\n"), images, rename


_SPECS = {
    "qwen2_vl": lambda: _qwen("qwen2_vl", {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32}),
    "qwen2_5_vl": lambda: _qwen(
        "qwen2_5_vl",
        {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 112,
         "fullatt_block_indexes": [1, 3], "tokens_per_second": 2, "hidden_act": "silu"},
    ),
    "qwen3_vl": _qwen3,
    "llava_next": lambda: _llava("llava_next"),
    "llava_onevision": lambda: _llava("llava_onevision"),
    "internvl": _internvl,
}  # fmt: skip


def _save_tokenizer(folder: Path, added: list[str], name: str) -> dict[str, int]:
    """Byte-level BPE as Qwen2's, with the family's special tokens behind the text; returns their ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*_CORPUS, "<|im_start|>system\nYou are a helpful assistant."], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in added}
    more = {}
    if name == "internvl":
        more["extra_special_tokens"] = {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }  # fmt: skip
    _dump(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "pad_token": added[0], "eos_token": added[2], "padding_side": "right",
         "model_max_length": 131072, "add_prefix_space": False, **more},
    )  # fmt: skip
    return ids
