"""The models that every method is tested on, each with one ragged batch of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny import GENERATE, IMAGE, VIDEO, inputs, llava, logits, pad, prompt, single, video_llava

NAMES = ("llava-llama", "llava-mistral", "llava-qwen2", "llava-qwen3", "video_llava", "text")


@dataclass
class Adapter:
    """One model and a left-padded batch of prompts of different lengths and numbers of visual tokens.

    Attributes:
        model: of 8 layers, float64.
        batch: arguments of the model's forward.
        n_visual, n_tokens: visual tokens and all tokens of each prompt.
        mask: [B, L] bool where visual tokens are, for a plain text model; else None.
        row: arguments and mask of one prompt of the batch by itself, without padding.
    """

    model: torch.nn.Module
    batch: dict
    n_visual: list[int]
    n_tokens: list[int]
    mask: Tensor | None
    row: Callable[[int], tuple[dict, Tensor | None]]

    def install(self, method, mask: Tensor | None = None):
        """The method's context manager for this model."""
        mask = self.mask if mask is None else mask
        return method(self.model) if mask is None else method(self.model, visual_mask=mask)

    def generate(self, arguments: dict | None = None, **options):
        """Three greedy tokens for the batch, or for other arguments."""
        options = GENERATE | {"max_new_tokens": 3} | options
        return self.model.generate(**(self.batch if arguments is None else arguments), **options)

    @cached_property
    def unpruned(self) -> Tensor:
        """Logits of the same without a method."""
        return logits(self.generate())


@cache
def adapter(name: str) -> Adapter:
    if name == "video_llava":
        return _video_llava()
    if name == "text":
        return _text()
    model = llava(name.removeprefix("llava-"))
    batch, rows = inputs("ragged", model)  # one image, two images, none
    counts = [row.count(IMAGE) for row in rows]
    return Adapter(model, batch, counts, [len(r) for r in rows], None, lambda b: (single(batch, rows, b), None))


def _video_llava() -> Adapter:
    model = video_llava()
    torch.manual_seed(3)
    rows = [prompt([4, "I", 8], n_image=16), prompt([6, "V", 11])]
    ids, mask = pad(rows)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_images": torch.randn(1, 3, 28, 28, dtype=model.dtype),
        "pixel_values_videos": torch.randn(1, 8, 3, 28, 28, dtype=model.dtype),
    }

    def row(b: int):
        name = ("pixel_values_images", "pixel_values_videos")[b]
        return {"input_ids": torch.tensor([rows[b]]), name: batch[name]}, None

    counts = [row.count(IMAGE) + row.count(VIDEO) for row in rows]
    return Adapter(model, batch, counts, [len(r) for r in rows], None, row)


def _text() -> Adapter:
    """A plain text model, given embeddings among which some are visual."""
    source = adapter("llava-llama")
    model = AutoModelForCausalLM.from_config(source.model.config.text_config).eval().to(source.model.dtype)
    model.model.load_state_dict(source.model.model.language_model.state_dict())
    model.generation_config = source.model.generation_config
    ids, attention = source.batch["input_ids"], source.batch["attention_mask"]
    visual = ids == IMAGE
    embeds = model.get_input_embeddings()(ids).detach()
    torch.manual_seed(5)
    embeds[visual] = torch.randn(int(visual.sum()), embeds.shape[-1], dtype=embeds.dtype)
    batch = {"inputs_embeds": embeds, "attention_mask": attention}

    def row(b: int):
        real = attention[b].bool()
        return {"inputs_embeds": embeds[b, real][None]}, visual[b, real][None]

    return Adapter(model, batch, source.n_visual, source.n_tokens, visual, row)
