"""CDPruner (arXiv 2506.10967, NeurIPS 2025): tokens that differ from each other and concern the question.

1. Relevance of a patch: minus the cosine of its CLIP image embedding (post-norm and visual projection of the layer that
   the language model reads) and the CLIP text embedding of the question, averaged over segments of 77 tokens; min-max
   normalised over the picture. (Minus: patches of CLIP resemble the texts that they do not show.) As in the authors'
   code only the first segment of a question of more than 75 tokens has a start token, only the last one an end; what
   CLIP takes for the embedding of the others is the state at the highest id, or at the first place.
2. Kernel: diag(relevance) C diag(relevance), C = cosines of the projected tokens.
3. T tokens by greedy MAP inference of the determinantal point process with that kernel, in their order.

Source: the paper and the authors' repository (Apache-2.0). LLaVA models contain CLIP's vision tower only, so the CLIP
model of the same tower has to be given (`clip=`, for LLaVA-1.5 openai/clip-vit-large-patch14-336); without it the
method refuses. Deviations: relevance is normalised per picture, not over the batch, and averaged over the segments of
the picture's own question; pictures of a prompt share the budget and are pruned one by one; the question is the
prompt's text after its last picture, without the final "ASSISTANT:" (the authors hand it over separately; `question=`
does that here). Reading it waits for the device. Kernel and relevance are computed in at least float32, and a gain of
the greedy inference that rounding makes negative counts as none (theirs becomes NaN).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.diversity import cosine_matrix, dpp_greedy
from sparsevlm.core.packing import take
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Vision, find_towers


@dataclass(frozen=True)
class CDPruner(VisionMethod):
    """Conditional diversity by a determinantal point process.

    Attributes:
        clip: CLIPModel whose vision tower is the model's, or its folder or hub id.
        tokenizer: of its text tower; None = the one in that folder.
        question: from the ids [L] of a prompt to its question; None = the text after the last picture, read with the
            tokenizer in the folder that the model was loaded from.
    """

    clip: Any = None
    tokenizer: Any = None
    question: Callable[[Tensor], str] | None = None

    name: ClassVar[str] = "cdpruner"
    captures: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    def check(self, family: Family) -> None:
        find_towers(family, self.name)
        if self.clip is None:
            raise ValueError(
                "method 'cdpruner' needs the text tower of the CLIP model that the vision tower comes from, which this "
                "model does not contain. Use clip=<CLIPModel, folder or hub id>"
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
                    "method 'cdpruner' reads the question from input_ids. Use them instead of inputs_embeds"
                )
            loaded = attached.scratch["loaded"]
            attached.scratch["texts"] = [loaded.embed(loaded.question(row)) for row in input_ids]

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        clip, texts = vision.scratch["loaded"].clip, vision.scratch["texts"]
        if encoding.prompts is None or len(encoding.prompts) != len(texts):
            raise ValueError("method 'cdpruner' must know the question. Pass input_ids and pixel values together")
        of_picture = [prompt for prompt, n in enumerate(encoding.prompts) for _ in range(n)]
        assert pictures.states is not None  # because of `captures`
        states = pictures.states if encoding.tower.cls else pictures.states[:, 1:]
        embeds = clip.visual_projection(clip.vision_model.post_layernorm(states))
        embeds = F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)
        pairs = zip(embeds, of_picture, strict=True)
        relevance = torch.stack([-(embed @ texts[prompt].to(embed).T).mean(1) for embed, prompt in pairs])
        low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
        relevance = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        return super().encode(vision, replace(pictures, relevance=relevance), encoding)

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        weight = pictures.relevance
        assert weight is not None  # `encode` has computed it
        kernel = weight[:, :, None] * cosine_matrix(pictures.features) * weight[:, None]
        origin = dpp_greedy(kernel, count).sort(1).values
        return Reduced(take(pictures.features, origin), origin, weight)


@dataclass
class _Loaded:
    """CLIP, its tokenizer and the function that reads a prompt's question, on the device of one model."""

    clip: Network
    tokenizer: Any
    question: Callable[[Tensor], str]

    @classmethod
    def of(cls, method: CDPruner, family: Family) -> _Loaded:
        from transformers import AutoTokenizer, CLIPModel

        path = method.clip if isinstance(method.clip, str) else None
        weight = next(family.decoder.parameters())
        clip: Network = CLIPModel.from_pretrained(path) if path else method.clip
        if method.tokenizer is None and path is None:
            raise ValueError("a loaded clip= comes without its tokenizer. Use tokenizer= of its text tower, too")
        tokenizer = AutoTokenizer.from_pretrained(path) if method.tokenizer is None else method.tokenizer
        question = method.question
        if question is None:
            folder = family.outer.config._name_or_path
            if not folder:
                raise ValueError(
                    "the model has no folder. Use question=, a function from a prompt's ids to its question"
                )
            question = _Question(AutoTokenizer.from_pretrained(folder), family.visual_ids)
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


class _Question:
    """The text of a prompt after its last visual token."""

    def __init__(self, tokenizer: Any, visual_ids: tuple[int, ...]):
        self.tokenizer, self.visual_ids = tokenizer, visual_ids

    def __call__(self, ids: Tensor) -> str:
        row = ids.tolist()
        last = max((i for i, token in enumerate(row) if token in self.visual_ids), default=-1)
        text = self.tokenizer.decode(row[last + 1 :], skip_special_tokens=True)
        return re.sub(r"\s*ASSISTANT:\s*$", "", text).strip()
