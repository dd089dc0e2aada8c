"""Questions and pictures -> the tensors of `generate`, for models whose visual tokens depend on the picture.

Placeholders, grids and token types are made by transformers' processor of the family; pictures go through Pillow here,
too, and the prompt is the checkpoint's chat template. Videos of these families are not prepared here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_processing_utils import VideoProcessorMixin

from sparsevlm.models.checkpoint import read_json
from sparsevlm.models.media import open_image
from sparsevlm.models.processor import Processor
from sparsevlm.models.prompts import as_conversation

_PLACE = "<image>"  # in a question: where a picture goes


@dataclass(frozen=True)
class Kind:
    """How a family's pictures are prepared.

    Attributes:
        processor: transformers' class; images: its image processor in Pillow form.
        limits: "pixels" = a picture is scaled to lie between two numbers of pixels, "tiles" = cut into tiles of which
            there are between two numbers; None = neither can be set.
    """

    processor: str
    images: type
    limits: str | None = None


KINDS = {
    "qwen2_vl": Kind("Qwen2VLProcessor", Qwen2VLImageProcessorPil, "pixels"),
    "qwen2_5_vl": Kind("Qwen2_5_VLProcessor", Qwen2VLImageProcessorPil, "pixels"),
    "qwen3_vl": Kind("Qwen3VLProcessor", Qwen2VLImageProcessorPil, "pixels"),
    "llava_next": Kind("LlavaNextProcessor", LlavaNextImageProcessorPil),
    "llava_onevision": Kind("LlavaOnevisionProcessor", LlavaOnevisionImageProcessorPil),
    "internvl": Kind("InternVLProcessor", GotOcr2ImageProcessorPil, "tiles"),
}


def check_dynamic(kind: str, prompt: str, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raise ValueError for options that a family of KINDS does not take."""
    if prompt != "hub":
        raise ValueError(f"prompt {prompt!r} is a conversation of LLaVA-1.5; a {kind!r} model takes prompt='hub'")
    given = [f"{n}={v}" for n, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None]
    if given and KINDS[kind].limits is None:
        raise ValueError(
            f"a {kind!r} model takes no {' and '.join(given)}: its pictures are cut into the crops that its "
            "checkpoint lists. Leave them out"
        )
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} {value!r} is no number of pixels. Use a whole number of at least 1, or null")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}. Use a smaller min_pixels")


class DynamicProcessor(Processor):
    """As `Processor`, with the number of placeholders that each picture needs.

    Attributes:
        min_pixels, max_pixels: limits of a picture's pixels after scaling (of all tiles, for InternVL), as they are in
            force; None where a family has none. The same number twice gives all pictures one number of pixels, up to
            the rounding to whole tokens.
    """

    image_aspect_ratio = "native"

    def __init__(
        self,
        tokenizer,
        image_processor,
        config: PreTrainedConfig,
        *,
        chat_template: str | None = None,
        prompt: str = "hub",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self.kind = config.model_type
        check_dynamic(self.kind, prompt, min_pixels, max_pixels)
        self.tokenizer, self.image_processor, self.prompt = tokenizer, image_processor, prompt
        self.chat_template = chat_template or tokenizer.chat_template
        if not self.chat_template:
            raise ValueError("the checkpoint has no chat template; add chat_template.jinja")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token; add one to tokenizer_config.json")
        tokenizer.padding_side = "left"
        self.image_token_id, self.video_token_id = config.image_token_id, getattr(config, "video_token_id", None)
        self._limit(min_pixels, max_pixels)
        self._make = _processor(self.kind, image_processor, tokenizer, config)
        if self._make.image_token_id != self.image_token_id:
            raise ValueError(
                f"tokenizer and model disagree: the placeholder of pictures is {self._make.image_token_id} in the "
                f"tokenizer and {self.image_token_id} in config.json; take both from the same checkpoint"
            )

    def _limit(self, min_pixels: int | None, max_pixels: int | None) -> None:
        images, limits = self.image_processor, KINDS[self.kind].limits
        self.min_pixels = self.max_pixels = None
        if limits == "pixels":
            size = images.size
            low = size["shortest_edge"] if min_pixels is None else min_pixels
            high = max(size["longest_edge"], low) if max_pixels is None else max_pixels
            self.min_pixels, self.max_pixels = min(low, high), high
            images.size = type(size)(**{"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels})
        elif limits == "tiles":
            tile = images.size["height"] * images.size["width"]
            if max_pixels is not None and max_pixels < tile:
                raise ValueError(f"max_pixels {max_pixels} is below one tile. Use at least {tile}")
            low = images.min_patches if min_pixels is None else max(1, -(-min_pixels // tile))
            high = max(images.max_patches, low) if max_pixels is None else max_pixels // tile
            images.min_patches, images.max_patches = min(low, high), high
            self.min_pixels, self.max_pixels = images.min_patches * tile, images.max_patches * tile

    @classmethod
    def from_folder(cls, folder: Path, config: PreTrainedConfig, **options) -> DynamicProcessor:
        kind = config.model_type
        again = "download the checkpoint again"
        if options.pop("image_aspect_ratio", "crop") == "pad":
            raise ValueError(f"a {kind!r} model keeps the shape of pictures. Leave image_aspect_ratio out")
        check_dynamic(kind, options.get("prompt", "hub"), options.get("min_pixels"), options.get("max_pixels"))
        _check_files(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
            images = KINDS[kind].images.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of many types, depending on what is damaged
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer or image processor of {folder} are damaged ({reason}); {again}") from error
        return cls(tokenizer, images, config, chat_template=_template(folder), **options)

    def __call__(
        self,
        text: str | list[dict[str, str]] | list,
        images=None,
        videos=None,
    ) -> BatchFeature:
        """Left-padded inputs of `generate` for one question or several; see `Processor.__call__`.

        Raises:
            ValueError: videos; a picture that cannot be used, or placeholders that do not fit the pictures.
        """
        single = isinstance(text, str) or (bool(text) and isinstance(text[0], dict))
        questions = [text] if single else list(text)
        if not questions:
            raise ValueError("no question given")
        images = self._per_question(images, "images", len(questions), single)
        if any(self._per_question(videos, "videos", len(questions), single)):
            raise ValueError(f"videos are not prepared for a {self.kind!r} model here. Give frames as images")
        prompts = [self.render(*q) for q in zip(questions, map(len, images), strict=True)]
        pictures = [
            [open_image(image, f"image {i} of question {q}") for i, image in enumerate(listed)]
            for q, listed in enumerate(images)
        ]
        some = {"images": [listed for listed in pictures if listed]} if any(pictures) else {}
        made = self._make(text=prompts, **some, padding=True, padding_side="left", return_tensors="pt")
        data = {k: v for k, v in made.items() if isinstance(v, torch.Tensor)}
        if "pixel_values" in data:
            data["pixel_values"] = data["pixel_values"].float()
        return BatchFeature(data)

    def render(self, question: str | list[dict[str, str]], n_images: int = 0, n_videos: int = 0) -> str:
        """The prompt as text; pictures stand where a question has `<image>`, else before its first turn.

        Raises:
            ValueError: malformed question, or `<image>` that do not fit the number of pictures.
        """
        messages = as_conversation(question)
        placed = sum(m["content"].count(_PLACE) for m in messages)
        if n_images and placed not in (0, n_images):
            start = messages[0]["content"][:100]
            raise ValueError(f"a question has {placed} {_PLACE} but {n_images} images; it begins {start!r}")
        turns = []
        for message in messages:
            pieces = message["content"].split(_PLACE) if n_images and placed else [message["content"]]
            content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
            for piece in pieces[1:]:
                content += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
            turns.append({"role": message["role"], "content": content})
        if not placed:
            turns[0]["content"] = [{"type": "image"}] * n_images + turns[0]["content"]
        prompt = self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        found = prompt.count(self._make.image_token)
        if found != n_images:
            raise ValueError(
                f"the prompt has {found} {self._make.image_token} for {n_images} images: the chat template places "
                "others, or the question spells one. Leave it out of the question"
            )
        return prompt


def _processor(kind: str, images, tokenizer, config: PreTrainedConfig):
    """transformers' processor; the numbers that it needs come from the model, which will count."""
    options: dict = {}
    vision = config.vision_config
    if kind == "llava_next":
        options = {"patch_size": vision.patch_size, "num_additional_image_tokens": 1}
    elif kind == "llava_onevision":
        options = {"num_image_tokens": (vision.image_size // vision.patch_size) ** 2}
        options["vision_aspect_ratio"] = config.vision_aspect_ratio
    elif kind == "internvl":
        options = {"image_seq_length": config.image_seq_length}
    if kind.startswith("llava"):
        options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    if kind != "llava_next":  # asked for, but given no videos
        options["video_processor"] = VideoProcessorMixin()
    try:
        return getattr(transformers, KINDS[kind].processor)(image_processor=images, tokenizer=tokenizer, **options)
    except (AttributeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer lacks what a {kind!r} model's prompts need ({reason})") from error


def _check_files(folder: Path) -> None:
    again = "download the checkpoint again"
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(f"{folder} has no tokenizer (tokenizer.json); {again}")
    nested = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and not (
        nested.is_file() and "image_processor" in read_json(nested)
    ):
        raise FileNotFoundError(f"{folder} has no image processor settings (preprocessor_config.json); {again}")


def _template(folder: Path) -> str | None:
    """The chat template of an older checkpoint's file of its own; None = the tokenizer has read it."""
    legacy = folder / "chat_template.json"
    if legacy.is_file() and not (folder / "chat_template.jinja").is_file():
        return read_json(legacy)["chat_template"]
    return None
