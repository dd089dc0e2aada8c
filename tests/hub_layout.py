"""Tiny checkpoints with random weights in exactly the file layout, config keys and weight names of the real ones.

Scaled down are only the widths, the depths and the vocabulary (512 instead of 32064; its special tokens sit at the same
place, right behind the last text token). Left out is `tokenizer.model`: `tokenizer.json` holds the same, and
transformers prefers it. The configs are the hub's: old key names, float16, and nothing that the defaults say already.
"""

from __future__ import annotations

import json
from pathlib import Path

import sparsevlm  # noqa: F401  # isort: skip  - before transformers: makes it importable beside any torchvision

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

TEXT_TOKENS = 448  # 32000 in the real ones
VOCABULARY = 512  # 32064 in the real ones
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_CORPUS = [
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: What is in the picture? ASSISTANT:",
    "Is there a cat in the image? Answer the question using a single word or phrase. yes no red green blue",
]
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}VIDEO{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_VIDEO_PART = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
)


def save_llava_7b(folder: Path, layers: int = 32, processor_config: str | None = "full") -> Path:
    """`llava-hf/llava-1.5-7b-hf`: 336 pixels, 576 visual tokens, 32 layers.

    Args:
        folder: where to write.
        layers: layers of the language model.
        processor_config: "full" (newer revisions), "nulls" (some in between) or None (older ones lack the file).
    """
    return _save_llava(folder, layers, processor_config, shards=3, parent="lmsys/vicuna-7b-v1.5", width=32, heads=4)


def save_llava_13b(folder: Path, layers: int = 40, processor_config: str | None = "full") -> Path:
    """`llava-hf/llava-1.5-13b-hf`: as 7B, wider and deeper, in six files. Arguments as :func:`save_llava_7b`."""
    return _save_llava(folder, layers, processor_config, shards=6, parent="lmsys/vicuna-13b-v1.5", width=40, heads=5)


def save_video_llava(folder: Path, layers: int = 4) -> Path:
    """`LanguageBind/Video-LLaVA-7B-hf`: 224 pixels, 256 visual tokens per image, 8 x 257 per video."""
    folder.mkdir(parents=True, exist_ok=True)
    added = _save_tokenizer(folder, ["<image>", "<video>", "<pad>"], "VideoLlavaProcessor")
    config = _config("VideoLlavaForConditionalGeneration", "video_llava", added, layers, 32, 4, "lmsys/vicuna-7b-v1.5")
    config["text_config"]["pad_token_id"] = 0
    config["video_token_index"] = added["<video>"]
    _dump(folder / "config.json", config)
    _save_processor(folder, 224, "VideoLlavaImageProcessor", "VideoLlavaProcessor")
    _dump(folder / "chat_template.json", {"chat_template": _TEMPLATE.replace("VIDEO", _VIDEO_PART)})
    torch.manual_seed(0)
    model = VideoLlavaForConditionalGeneration(VideoLlavaConfig.from_pretrained(folder))
    _save_weights(folder, model, shards=3)
    return folder


def _save_llava(folder, layers, processor_config, shards, parent, width, heads) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    added = _save_tokenizer(folder, ["<image>", "<pad>"], "LlavaProcessor")
    config = _config("LlavaForConditionalGeneration", "llava", added, layers, width, heads, parent)
    config["vision_config"]["image_size"] = 336
    _dump(folder / "config.json", config)
    _save_processor(folder, 336, "CLIPImageProcessor", "LlavaProcessor")
    if processor_config is not None:
        known = processor_config == "full"
        _dump(
            folder / "processor_config.json",
            {
                "image_token": "<image>",
                "num_additional_image_tokens": 1 if known else None,
                "patch_size": 14 if known else None,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default" if known else None,
            },
        )
    _dump(folder / "chat_template.json", {"chat_template": _TEMPLATE.replace("VIDEO", "")})
    torch.manual_seed(0)
    _save_weights(folder, LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)), shards)
    return folder


def _config(made_for, model_type, added, layers, width, heads, parent) -> dict:
    return {
        "architectures": [made_for],
        "ignore_index": -100,
        "image_token_index": added["<image>"],
        "model_type": model_type,
        "pad_token_id": added["<pad>"],
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": parent,
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": VOCABULARY,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "model_type": "clip_vision_model",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "patch_size": 14,
            "projection_dim": 16,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _save_processor(folder: Path, size: int, kind: str, processor_class: str) -> None:
    _dump(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": size, "width": size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": MEAN,
            "image_processor_type": kind,
            "image_std": STD,
            "processor_class": processor_class,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": size},
        },
    )


def _save_tokenizer(folder: Path, added: list[str], processor_class: str) -> dict[str, int]:
    """Llama's tokenizer (byte-fallback BPE over "▁"-marked words) with a small vocabulary; returns the added ids."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=TEXT_TOKENS, special_tokens=start, show_progress=False)
    )
    bpe = json.loads(learned.to_str())["model"]
    vocabulary = dict(bpe["vocab"])
    for spare in range(len(vocabulary), TEXT_TOKENS):
        vocabulary[f"▁spare{spare}"] = spare
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [tuple(m) for m in bpe["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    special = ["<unk>", "<s>", "</s>", *added]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in added}
    assert list(ids.values()) == list(range(TEXT_TOKENS, TEXT_TOKENS + len(added)))
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _dump(folder / "added_tokens.json", ids)
    _dump(
        folder / "special_tokens_map.json",
        {
            "bos_token": {"content": "<s>", **entry},
            "eos_token": {"content": "</s>", **entry},
            "pad_token": {"content": "<pad>", **entry},
            "unk_token": {"content": "<unk>", **entry},
        },
    )
    _dump(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **entry} for t in special},
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "legacy": False,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": processor_class,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "trust_remote_code": False,
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    _dump(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": ids["<pad>"],
            "transformers_version": "4.36.0.dev0",
        },
    )
    return ids


def _save_weights(folder: Path, model, shards: int) -> None:
    """float16 safetensors under the hub's weight names, split, with an index."""
    _write_shards(folder, {_hub_name(k): v for k, v in model.state_dict().items()}, shards, torch.float16)


def _write_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int, dtype: torch.dtype) -> None:
    weights = {k: v.to(dtype).contiguous() for k, v in weights.items()}
    names = sorted(weights)
    size = -(-len(names) // shards)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * size : (i + 1) * size]
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(v.numel() * v.element_size() for v in weights.values())
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _hub_name(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    for tower in ("vision_tower.", "image_tower.", "video_tower."):
        if name.startswith(tower):
            return f"{tower}vision_model.{name.removeprefix(tower)}"
    return name.replace("language_model.", "language_model.model.", 1)


def _dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
