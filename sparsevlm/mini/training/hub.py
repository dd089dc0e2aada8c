"""Tokenizer, processor and export of the embedded model, laid out as ``llava-hf/llava-1.5-7b-hf`` is on the model hub.

The chat template is that repository's own. Its prompt, ``USER: <image>\\n{question} ASSISTANT:``, becomes the prompt of
the training, ``<s> user : <image> x 576 {question} assistant :``, because the tokenizer lower-cases, drops line ends
and sets punctuation apart. So the code path of a real checkpoint serves the embedded one unchanged.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaForConditionalGeneration,
)

from sparsevlm.mini.clips import GRID as CLIP_GRID
from sparsevlm.mini.scenes import GRID, PATCH
from sparsevlm.mini.vocabulary import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    UNKNOWN,
    VIDEO,
    VIDEO_VOCAB_SIZE,
    VIDEO_WORDS,
    VOCAB_SIZE,
    WORD_ID,
    WORDS,
)

#: Pixels enter the model as ``(value / 255 - MEAN) / STD``, the same for all three channels.
MEAN, STD = 0.35, 0.27
PICTURE = GRID * PATCH

# The template of llava-hf/llava-1.5-7b-hf (chat_template.jinja); Video-LLaVA's has _VIDEO_PART in it as well.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


_VIDEO_PART = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
)
VIDEO_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{# Render all text next #}", _VIDEO_PART + "{# Render all text next #}")


def build_tokenizer(video: bool = False) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over ``WORDS`` or, for the video model, ``VIDEO_WORDS``; ``<unk>`` takes the first spare id.

    Adds ``<s>`` and pads on the left.
    """
    words, size = (VIDEO_WORDS, VIDEO_VOCAB_SIZE) if video else (WORDS, VOCAB_SIZE)
    words = [*words, UNKNOWN, *(f"<spare{i}>" for i in range(len(words) + 1, size))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # "What digit is red?" -> what digit is red ?    Of all punctuation only ":" and "?" are words.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s:?]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, WORD_ID[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE} | ({"video_token": VIDEO} if video else {}),
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor(pixels: int):
    """PIL image processor for square pictures of so many pixels (no resampling there)."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": pixels},
        crop_size={"height": pixels, "width": pixels},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )


def build_processor() -> LlavaProcessor:
    """Processor of the model for pictures: :func:`build_tokenizer` and pictures of ``168 x 168`` pixels."""
    return LlavaProcessor(
        image_processor=build_image_processor(PICTURE),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def export(model: LlavaForConditionalGeneration | VideoLlavaForConditionalGeneration, folder: str | Path) -> Path:
    """Writes model (bfloat16), tokenizer and processor as a hub folder that ``from_pretrained`` loads.

    The folder appears complete or not at all; one that is there already is replaced. The model is left as it was.

    Returns:
        ``folder`` as a path.

    Raises:
        FileExistsError: ``folder`` exists and is not such a folder (it is not touched then).
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} exists and holds something else than a model; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(draft)
        if model.config.model_type == "video_llava":
            _write_video_processor(draft)
        else:
            _write_processor(draft)
        draft.chmod(0o755)  # mkdtemp and safetensors make them private
        for file in draft.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_processor(folder: Path) -> None:
    processor = build_processor()
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _write_json(
        folder / "processor_config.json",
        {
            "image_token": IMAGE,
            "num_additional_image_tokens": processor.num_additional_image_tokens,
            "patch_size": processor.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": processor.vision_feature_select_strategy,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_video_processor(folder: Path) -> None:
    """As `LanguageBind/Video-LLaVA-7B-hf`, which has no processor_config.json."""
    build_tokenizer(video=True).save_pretrained(folder)
    build_image_processor(CLIP_GRID * PATCH).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    names = {"image_processor_type": "VideoLlavaImageProcessor", "processor_class": "VideoLlavaProcessor"}
    _write_json(folder / "preprocessor_config.json", settings | names)
    (folder / "chat_template.jinja").write_text(VIDEO_CHAT_TEMPLATE, encoding="utf-8")


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The float32 state of an embedded model in a hub folder, for ``load_state_dict``.

    Raises:
        ValueError: ``folder`` holds no embedded model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: name a folder with config.json and model.safetensors")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.state_dict()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
