"""Base of the methods that compare patches with the question in CLIP's joint space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.methods._question import Question
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Vision, find_towers


@dataclass(frozen=True)
class ClipMethod(VisionMethod):
    """Base that gives `reduce` the `relevance` of the patches, and `more["embeds"]`, their unit CLIP embeddings.

    Attributes:
        clip: CLIPModel whose vision tower is the model's, or its folder or hub id.
        tokenizer: of its text tower; None = the one in that folder.
        question: from the ids [L] of a prompt to its question; None = the text after the last picture, read with the
            tokenizer in the folder that the model was loaded from.
    """

    clip: Any = None
    tokenizer: Any = None
    question: Callable[[Tensor], str] | None = None

    captures: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    def check(self, family: Family) -> None:
        find_towers(family, self.name)
        if self.clip is None:
            raise ValueError(
                f"method {self.name!r} needs the text tower of the CLIP model that the vision tower comes from, which "
                "this model does not contain. Use clip=<CLIPModel, folder or hub id>"
            )

    def attach(self, family: Family) -> Vision | None:
        vision = super().attach(family)
        loaded = _Loaded.of(self, family)
        width = loaded.clip.visual_projection.in_features
        for tower in find_towers(family, self.name):
            if tower.module.config.hidden_size != width:
                raise ValueError(
                    f"the given CLIP model projects states of width {width}, the vision tower has "
                    f"{tower.module.config.hidden_size}. Use the CLIP model that the tower comes from"
                )
        if vision is not None:
            vision.scratch |= {"loaded": loaded, "texts": []}
        return vision

    def announce(self, attached: Vision | None, input_ids: Tensor) -> None:
        super().announce(attached, input_ids)
        if attached is not None:
            if (input_ids < 0).any():
                raise ValueError(
                    f"method {self.name!r} reads the question from input_ids. Use them instead of inputs_embeds"
                )
            loaded = attached.scratch["loaded"]
            attached.scratch["texts"] = [loaded.embed(loaded.question(row)) for row in input_ids]

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        clip, texts = vision.scratch["loaded"].clip, vision.scratch["texts"]
        if encoding.prompts is None or len(encoding.prompts) != len(texts):
            raise ValueError(f"method {self.name!r} must know the question. Pass input_ids and pixel values together")
        of_picture = [prompt for prompt, n in enumerate(encoding.prompts) for _ in range(n)]
        assert pictures.states is not None  # because of `captures`
        states = pictures.states if encoding.tower.cls else pictures.states[:, 1:]
        embeds = clip.visual_projection(clip.vision_model.post_layernorm(states))
        embeds = F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)
        pairs = zip(embeds, of_picture, strict=True)
        relevance = torch.stack([-(embed @ texts[prompt].to(embed).T).mean(1) for embed, prompt in pairs])
        low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
        relevance = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        return super().encode(
            vision, replace(pictures, relevance=relevance, more=pictures.more | {"embeds": embeds}), encoding
        )


@dataclass
class _Loaded:
    """CLIP, its tokenizer and the function that reads a prompt's question, on the device of one model."""

    clip: Network
    tokenizer: Any
    question: Callable[[Tensor], str]

    @classmethod
    def of(cls, method: ClipMethod, family: Family) -> _Loaded:
        from transformers import AutoTokenizer, CLIPModel

        path = method.clip if isinstance(method.clip, str) else None
        weight = next(family.decoder.parameters())
        clip: Network = CLIPModel.from_pretrained(path) if path else method.clip
        if method.tokenizer is None and path is None:
            raise ValueError("a loaded clip= comes without its tokenizer. Use tokenizer= of its text tower, too")
        tokenizer = AutoTokenizer.from_pretrained(path) if method.tokenizer is None else method.tokenizer
        question = method.question
        if question is None:
            question = Question.of(family)
            if question is None:
                raise ValueError(
                    "the model has no folder. Use question=, a function from a prompt's ids to its question"
                )
        return cls(clip.to(weight.device, weight.dtype).eval(), tokenizer, question)

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Embed a question: unit vectors [segments, p]."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        size = self.clip.config.text_config.max_position_embeddings
        padding = -len(ids) % size
        mask = torch.tensor([1] * len(ids) + [0] * padding, device=self.clip.device).view(-1, size)
        segments = torch.tensor(ids + [0] * padding, device=self.clip.device).view(-1, size)
        out = self.clip.text_projection(self.clip.text_model(segments, attention_mask=mask).pooler_output)
        return F.normalize(out.to(torch.promote_types(out.dtype, torch.float32)), dim=-1)
