"""Questions, pictures and videos -> the tensors of `generate`; the same ones on every machine.

Pictures always go through Pillow: transformers' default image processors resize with torchvision where that is
installed, and the pixels then differ (up to 0.03 after normalisation) from machine to machine.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sparsevlm.models.checkpoint import read_json
from sparsevlm.models.media import is_video, open_image, sample_frames
from sparsevlm.models.pixels import clip_pixels
from sparsevlm.models.prompts import CONVERSATIONS, PROMPTS, as_conversation, render_conversation, render_hub
from sparsevlm.runtime.families import RECORDS

IMAGE_ASPECT_RATIOS = ("crop", "pad")
_NATIVE = "native"  # of models whose visual tokens depend on the picture
#: Frames of a video, as Video-LLaVA was trained.
VIDEO_FRAMES = 8


def n_visual_tokens(model, kind: str = "image") -> int:
    """Visual tokens that one image or one video takes in the prompt.

    Args:
        model: a LLaVA or Video-LLaVA model, or its config.
        kind: "image" or "video" (8 frames; unlike an image, every frame keeps its CLS token).

    Raises:
        ValueError: a model that takes no input of that kind.
    """
    config = getattr(model, "config", model)
    if not RECORDS[config.model_type].grid:
        raise ValueError(
            f"in a model of type {config.model_type!r} the number of visual tokens depends on the picture. Count the "
            "placeholders in the processor's input_ids"
        )
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if kind == "image":
        return patches if config.vision_feature_select_strategy == "default" else patches + 1
    if kind == "video" and config.model_type == "video_llava":
        return VIDEO_FRAMES * (patches + 1)
    raise ValueError(f"a model of type {config.model_type!r} takes no input of kind {kind!r}")


def check_options(prompt: str, image_aspect_ratio: str) -> None:
    """ValueError unless both are known."""
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}; known: {', '.join(PROMPTS)}")
    if image_aspect_ratio not in (*IMAGE_ASPECT_RATIOS, _NATIVE):
        raise ValueError(f"unknown image_aspect_ratio {image_aspect_ratio!r}; known: {', '.join(IMAGE_ASPECT_RATIOS)}")


class Processor:
    """Prompt, placeholder tokens, pixels and left padding for LLaVA and Video-LLaVA in one call.

    Attributes:
        tokenizer: the checkpoint's tokenizer; pads on the left.
        image_processor: the checkpoint's, in its Pillow form.
        prompt: "hub" (the checkpoint's chat template), or the conversation of the authors' evaluations: "vicuna_v1"
            (LLaVA-1.5, SparseVLM) or "llava_v1" (Video-LLaVA). In the latter two the text before and after a picture is
            tokenized by itself, as the authors do (llava/mm_utils.py:tokenizer_image_token).
        image_aspect_ratio: "crop" (the middle square, as on the hub) or "pad" (padded to a square with the mean colour
            first, as LLaVA-1.5 was trained and evaluated). Of pictures; videos see :func:`clip_pixels`.
        image_token_id: id of the image placeholder.
        video_token_id: id of the video placeholder, None for models without video.
    """

    def __init__(
        self,
        tokenizer,
        image_processor: LlavaImageProcessorPil,
        config: PreTrainedConfig,
        *,
        chat_template: str | None = None,
        prompt: str = "hub",
        image_aspect_ratio: str = "crop",
    ):
        check_options(prompt, image_aspect_ratio)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.prompt, self.image_aspect_ratio = prompt, image_aspect_ratio
        self.chat_template = chat_template or tokenizer.chat_template
        self.image_token_id = config.image_token_id
        self.video_token_id = config.video_token_id if config.model_type == "video_llava" else None
        self._size = config.vision_config.image_size
        # The number of placeholders comes from the model, which will count them: processor settings are often missing.
        self._placeholders = {"<image>": n_visual_tokens(config, "image")}
        if self.video_token_id is not None:
            self._placeholders["<video>"] = n_visual_tokens(config, "video")
        self._check(config)
        tokenizer.padding_side = "left"

    @classmethod
    def from_folder(cls, folder: Path, config: PreTrainedConfig, **options) -> Processor:
        """The processor of a checkpoint folder in the hub's layout, of any age.

        Raises:
            FileNotFoundError: tokenizer or image processor settings are missing.
            ValueError: settings that do not fit the model or each other, or unknown options.
        """
        check_options(options.get("prompt", "hub"), options.get("image_aspect_ratio", "crop"))
        options = {k: v for k, v in options.items() if k not in ("min_pixels", "max_pixels") or v is not None}
        if options.get("image_aspect_ratio") == _NATIVE:
            raise ValueError(f"a model of type {config.model_type!r} takes square pictures. Use crop or pad")
        if limits := [name for name in ("min_pixels", "max_pixels") if name in options]:
            raise ValueError(
                f"{' and '.join(limits)}: all pictures of a model of type {config.model_type!r} have "
                f"{config.vision_config.image_size} x {config.vision_config.image_size} pixels. Use downsample for "
                "smaller ones"
            )
        again = "download the checkpoint again"
        if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
            raise FileNotFoundError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); {again}")
        nested = folder / "processor_config.json"  # newer checkpoints keep the settings for pictures in there
        if not (folder / "preprocessor_config.json").is_file() and not (
            nested.is_file() and "image_processor" in read_json(nested)
        ):
            raise FileNotFoundError(f"{folder} has no image processor settings (preprocessor_config.json); {again}")
        pad = options.get("image_aspect_ratio") == "pad"
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
            image_processor = LlavaImageProcessorPil.from_pretrained(folder, do_pad=pad, local_files_only=True)
        except Exception as error:  # of many types, depending on what is damaged
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer or image processor of {folder} are damaged ({reason}); {again}") from error
        legacy = folder / "chat_template.json"
        template = read_json(legacy)["chat_template"] if legacy.is_file() else None
        if (folder / "chat_template.jinja").is_file():  # newer; the tokenizer has read it
            template = None
        return cls(tokenizer, image_processor, config, chat_template=template, **options)

    def _check(self, config: PreTrainedConfig) -> None:
        tokenizer, size = self.tokenizer, config.vision_config.image_size
        for token, expected in (("<image>", self.image_token_id), ("<video>", self.video_token_id)):
            found = tokenizer.convert_tokens_to_ids(token)
            if expected is not None and found != expected:
                raise ValueError(
                    f"tokenizer and model disagree: {token} is {found} in the tokenizer and {expected} in config.json; "
                    "take both from the same checkpoint"
                )
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token; add one to tokenizer_config.json")
        if self.prompt == "hub" and not self.chat_template:
            raise ValueError(
                f"the checkpoint has no chat template; use prompt={self._conversation!r} or add chat_template.jinja"
            )
        if system := CONVERSATIONS.get(self.prompt):
            ids = tokenizer(system, add_special_tokens=False)["input_ids"]
            if tokenizer.decode(ids, skip_special_tokens=True).split() != system.split():
                raise ValueError(
                    f"this checkpoint's vocabulary cannot spell the prompt {self.prompt!r}; use prompt='hub'"
                )
        made = list(self._pixels([Image.new("RGB", (8, 8))]).shape[-2:])
        if made != [size, size]:
            raise ValueError(
                f"the image processor makes {made} pixels, the model takes {[size, size]}: take both from "
                "the same checkpoint"
            )

    def __call__(self, text, images=None, videos=None) -> BatchFeature:
        """Inputs for `generate`.

        Args:
            text: a question, or a list of them. A question is a string or a conversation: a list of turns
                ``{"role": "user" or "assistant", "content": str}``. Pictures go before the first turn's text, unless
                the text says itself where they belong (``<image>``, ``<video>``).
            images: the question's picture or list of pictures (PIL, file, or array [H, W, 3] uint8); for a list of
                questions a list of these, None where a question has none.
            videos: likewise; a video is a file, an array [T, H, W, 3] uint8 or a list of frames, of which 8 are taken
                (some several times, if it has fewer).

        Returns:
            `input_ids`, `attention_mask` [B, L] int64, padded on the left; with images, `pixel_values`
            [images, 3, H, W] float32; with videos, `pixel_values_videos` [videos, 8, 3, H, W] float32.

        Raises:
            ValueError: the numbers of questions, placeholders and pictures do not fit, or a picture cannot be used; the
                message names it.
        """
        single = isinstance(text, str) or (bool(text) and isinstance(text[0], dict))
        questions = [text] if single else list(text)
        if not questions:
            raise ValueError("no question given")
        images = self._per_question(images, "images", len(questions), single)
        videos = self._per_question(videos, "videos", len(questions), single)
        prompts = [self.render(*q) for q in zip(questions, map(len, images), map(len, videos), strict=True)]
        data = self._left_padded([self._ids(p) for p in prompts])
        pictures = [
            open_image(image, f"image {i} of question {q}")
            for q, listed in enumerate(images)
            for i, image in enumerate(listed)
        ]
        if pictures:
            data["pixel_values"] = self._pixels(pictures)
        clips = [
            self._clip_pixels(sample_frames(video, VIDEO_FRAMES, f"video {i} of question {q}"))
            for q, listed in enumerate(videos)
            for i, video in enumerate(listed)
        ]
        if clips:
            data["pixel_values_videos"] = torch.stack(clips)
        return BatchFeature(data)

    def render(self, question: str | list[dict[str, str]], n_images: int = 0, n_videos: int = 0) -> str:
        """The prompt as text, one placeholder per picture (`__call__` multiplies them).

        Raises:
            ValueError: malformed question, or placeholders that do not fit the numbers of pictures and videos.
        """
        if n_videos and self.video_token_id is None:
            raise ValueError("this model takes no videos; use a Video-LLaVA checkpoint, or give frames as images")
        messages = as_conversation(question)
        wanted = {"image": n_images, "video": n_videos}
        media = []
        for kind, count in wanted.items():
            token = f"<{kind}>"
            placed = sum(m["content"].count(token) for m in messages) if token in self._placeholders else 0
            if placed and placed != count:
                start = messages[0]["content"][:100]
                raise ValueError(f"a question has {placed} {token} but {count} {kind}s; it begins {start!r}")
            media += [kind] * (0 if placed else count)
        if self.prompt in CONVERSATIONS:
            return render_conversation(self.prompt, messages, media)
        prompt = render_hub(messages, media, self.tokenizer, self.chat_template)
        for kind, count in wanted.items():
            if count and prompt.count(f"<{kind}>") != count:
                raise ValueError(
                    f"the checkpoint's chat template places {prompt.count(f'<{kind}>')} <{kind}> for {count} {kind}s; "
                    f"use prompt={self._conversation!r}"
                )
        return prompt

    def decode(self, ids, skip_special_tokens: bool = True, **options) -> str:
        """Text of one sequence of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options)

    def batch_decode(self, ids, skip_special_tokens: bool = True, **options) -> list[str]:
        """Text of each sequence of ids."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens, **options)

    @property
    def _conversation(self) -> str:
        """What the authors of this kind of model evaluate with."""
        return "vicuna_v1" if self.video_token_id is None else "llava_v1"

    def _ids(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt, each placeholder multiplied.

        The text between placeholders is tokenized piece by piece in the authors' conversations (so a piece starts as a
        text of its own: "▁" before the line break that follows a picture), and at once in the checkpoint's template,
        whose tokenizer decides.
        """
        encode = self.tokenizer
        bos = encode.bos_token
        start = not (bos and prompt.startswith(bos))  # a template may write it itself
        if self.prompt not in CONVERSATIONS:
            for token, count in self._placeholders.items():
                prompt = prompt.replace(token, token * count)
            return encode(prompt, add_special_tokens=start)["input_ids"]
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(self._placeholders)})", prompt):
            if piece in self._placeholders:
                ids += [encode.convert_tokens_to_ids(piece)] * self._placeholders[piece]
            else:
                ids += encode(piece, add_special_tokens=start and not ids)["input_ids"]
        return ids

    def _left_padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [B, L]."""
        width = max(map(len, rows))
        missing = [width - len(row) for row in rows]
        padded = [[self.tokenizer.pad_token_id] * n + row for n, row in zip(missing, rows, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in missing]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    def _pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        """[N, 3, H, W] float32."""
        return self.image_processor(pictures, return_tensors="pt")["pixel_values"].float()

    def _clip_pixels(self, frames: list[Image.Image]) -> torch.Tensor:
        """[T, 3, H, W] float32."""
        return clip_pixels(frames, self._size, self.image_processor.image_mean, self.image_processor.image_std)

    @staticmethod
    def _per_question(media, what: str, n: int, single: bool) -> list[list]:
        """A list of pictures (or of videos) for each question."""
        if media is None:
            return [[] for _ in range(n)]
        one = is_video if what == "videos" else lambda m: not isinstance(m, (list, tuple))
        listed = [media] if single else list(media)
        if len(listed) != n:
            raise ValueError(f"{n} questions but {what} for {len(listed)}: give one entry per question, None for none")
        return [[] if m is None else [m] if one(m) else list(m) for m in listed]
