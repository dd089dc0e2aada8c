"""MMTok (arXiv 2508.18264, ICLR 2026): tokens that cover the question's words and the picture.

1. Words: the question without the two sentences that ask LLaVA for short answers, cut into words, less 47 words that
   show nothing (if none is left: the whole question); z = their embeddings in the language model's input layer, word by
   word.
2. P = softmax over the patches of cos(z, p) / 0.02, over the number of words, p = the projector's outputs; Q = softmax
   of the cosines of the vision tower's outputs / 0.2, over the number of patches. Both in float32.
3. Greedy maximum coverage of the rows of P and 0.5 Q: always the token that raises the sum of the rows' maxima most,
   which begin at 0. They keep their order.
4. Patches that lie wholly in the padding of a squared picture are not chosen.

Nothing but the number of tokens depends on T. Where P is peaked, each word is covered by one token, and `alpha` matters
no more.

Source: the authors' repository (Ironieser/MMTok, d1522cd, mmtok/core and mmtok/llava; Apache-2.0). Its selector's own
default of `text_temperature`, 0.01, is not what its LLaVA runs use.

`words="keywords"` needs the tokenizer in the folder that the model was loaded from. `words="all"` takes all ids after
the last picture, without padding; a function from a prompt's ids [L] to ids, whatever you like.

Deviations: the size of the original picture is not known here, so point 4 is done only where `sizes` is given, a
function that returns (width, height) of each picture of the call (a picture cropped to a square has no padding; with a
list of pictures the authors' code ignores padding, too); pictures of a prompt, and frames, share T and cover the words
each by itself; a frame's own CLS token, where the model takes it, is dropped first; ties go by index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.coverage import facility_location
from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.core.precision import at_least_float32
from sparsevlm.methods._question import Question, after_picture
from sparsevlm.methods._vision import VisionMethod, patches, selected
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Vision

#: What the authors leave out (mmtok/core/text_processor.py).
FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
UNSEEN = frozenset(
    "a an the is are was were be been being have has had do does did it they he she we you i what where when why how "
    "who which and or but so if then question answer to for with by from at into onto upon".split()
)


@dataclass(frozen=True)
class MMTok(VisionMethod):
    """Multimodal coverage.

    Attributes:
        alpha: weight of covering the picture.
        text_temperature, vision_temperature: of the two softmaxes.
        words: "keywords", "all", or a function from the ids [L] of a prompt to the ids of its words.
        sizes: function without arguments that returns (width, height) of the original pictures of the call, padded to
            squares; None = no patch is padding.
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    words: str | Callable[[Tensor], Sequence[int]] = "keywords"
    sizes: Callable[[], Sequence[tuple[int, int]]] | None = None

    name: ClassVar[str] = "mmtok"
    captures: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.words) and self.words not in ("keywords", "all"):
            raise ValueError(f"words {self.words!r} is unknown. Use 'keywords', 'all', or a function")
        if min(self.text_temperature, self.vision_temperature) <= 0:
            raise ValueError("text_temperature and vision_temperature must be positive")

    def attach(self, family: Family) -> Vision | None:
        vision = super().attach(family)
        if vision is not None:
            counting = next(family.decoder.parameters()).is_meta  # nothing can be read
            vision.scratch |= {"reader": None if counting else self._reader(family), "words": []}
        return vision

    def _reader(self, family: Family) -> Callable[[Tensor], Sequence[int]]:
        if callable(self.words):
            return self.words
        if self.words == "all":
            padding = family.decoder.config.pad_token_id
            return lambda ids: [i for i in after_picture(ids, family.visual_ids) if i != padding]
        question = Question.of(family)
        if question is None:
            raise ValueError(
                "method 'mmtok' reads the question with the tokenizer in the model's folder, and this model has none. "
                "Use words='all', or words=, a function from a prompt's ids to the ids of its words"
            )
        return lambda ids: _tokens(question.tokenizer, keywords(question(ids)))

    def announce(self, attached: Vision | None, input_ids: Tensor) -> None:
        super().announce(attached, input_ids)
        if attached is None:
            return
        embed = attached.family.outer.get_input_embeddings()
        if input_ids.is_meta:  # multiply-adds are counted as if every other token were a word
            attached.scratch["words"] = [embed(row[: -attached.tokens]) for row in input_ids]
            return
        if (input_ids < 0).any():
            raise ValueError("method 'mmtok' reads the words from input_ids. Use them instead of inputs_embeds")
        ids = [torch.tensor(list(attached.scratch["reader"](row)), dtype=torch.int64) for row in input_ids]
        attached.scratch["words"] = [embed(i.to(input_ids.device)).detach() for i in ids]

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        words = vision.scratch["words"]
        if encoding.prompts is None or len(encoding.prompts) != len(words):
            raise ValueError("method 'mmtok' must know the question. Pass input_ids and pixel values together")
        of_picture = [words[prompt] for prompt, n in enumerate(encoding.prompts) for _ in range(n)]
        rows = [
            self.text_rows(z[None], features[None])[0]
            for z, features in zip(of_picture, patches(pictures), strict=True)
        ]
        most = max(len(r) for r in rows)  # a row of zeros is covered
        more = {"words": torch.stack([F.pad(r, (0, 0, 0, most - len(r))) for r in rows])}
        if self.sizes is not None:
            sizes = self.sizes()
            if len(sizes) != len(rows):
                raise ValueError(f"sizes() returned {len(sizes)} sizes for {len(rows)} pictures")
            free = [outside_padding(size, encoding.tower.grid) for size in sizes]
            more["free"] = torch.tensor(free, device=rows[0].device)
        return super().encode(vision, replace(pictures, more=pictures.more | more), encoding)

    def text_rows(self, words: Tensor, features: Tensor) -> Tensor:
        """Return P [n, m, N] of m words [n, m, D] and N projected patches [n, N, D]."""
        dtype = at_least_float32(features.dtype)
        z, p = (F.normalize(x, dim=-1).to(dtype) for x in (words.to(features.device), features))
        return (z @ p.mT / self.text_temperature).softmax(-1) / max(words.shape[1], 1)

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        assert pictures.states is not None  # because of `captures`
        similar = cosine_matrix(pictures.states[:, 1:])
        seen = (similar / self.vision_temperature).softmax(-1) * (self.alpha / similar.shape[1])
        rows = torch.cat([pictures.more["words"].to(seen), seen], 1)
        free = pictures.more.get("free")
        return selected(pictures, facility_location(rows, count, valid=free))


def keywords(question: str) -> list[str]:
    """Return the words of a question that the authors embed."""
    for sentence in FORMATS:
        question = question.replace(sentence, "")
    words = [word for word in re.findall(r"\b\w+\b", question) if word.lower() not in UNSEEN]
    return words or question.split()


def _tokens(tokenizer: Any, words: list[str]) -> list[int]:
    return tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"] if words else []


def outside_padding(size: tuple[int, int], grid: int) -> list[bool]:
    """Return which of the grid * grid patches of a picture of (width, height), padded to a square, show some of it."""
    padding = [(max(size) - side) * grid // (2 * max(size)) for side in size]
    columns, rows = ([p <= i < grid - p for i in range(grid)] for p in padding)
    return [row and column for row in rows for column in columns]
