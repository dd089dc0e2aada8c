"""SGL: a small model guides the pruning of a large one (arXiv 2412.03324, CVPR 2025).

1. A small model, the guide, answers the same question about the same picture first: greedily, unpruned. Importance of a
   visual token = the softmaxed attention that it gets there, summed over all layers and heads, and over the rows from
   the last visual token (inclusive) to the last token of the prompt, and one row per generated token that is fed back;
   the last one, the end or the limit, never is.
2. The large model keeps the `keep` visual tokens of highest importance for the layers from K on, in their order and
   with their original position ids. None of its own attention is looked at, so K = 0 (before layer 0) is possible.
3. Early exit (SEE): the guide's answer is taken where it is sure enough of it (`surety`). The authors' released code
   only logs these numbers and never leaves early; here it is the evaluation that does.

Source: NUS-HPC-AI-Lab/SGL at 7e76fd2, `internvl/model/internlm2/modeling_internlm2.py`. Its `prune_ratio` is the share
that is *kept*. Its first row is the last visual token's although the paper speaks of the text: an off-by-one that moves
the importance by 5 to 9 % of its maximum; kept here. What a budget means is as in FastV.

Deviations from the authors' code: batches, several pictures per prompt, padding and beams (theirs needs batch 1 and one
beam); each sample's rows begin at its own last visual token and end with its own prompt and answer. Only the rows that
count are computed, in float32 also in half precision. The guide is asked once per prompt, of the tokens that this call
or generate() brings: of a later turn it does not see the earlier ones. It answers greedily whatever the large model
does, and ends where its own `generation_config` says.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._guides import find_guide
from sparsevlm.methods.bases import PruneOnce
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.guide import Answers, Guide, Prompts
from sparsevlm.runtime.inputs import RAW_PIXELS, has_pixels, real_tokens
from sparsevlm.runtime.ownership import asleep, owned
from sparsevlm.runtime.parts import GUIDE, part
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage


@dataclass(frozen=True)
class SGL(PruneOnce):
    """Small-guided pruning. `k`, `keep`, `match` and `early_drop` as in `PruneOnce`; `k` may be 0.

    Attributes:
        guide: the small model: loaded, its folder or hub id, or "self", the model itself. None = the guide that is
            shipped for the embedded model `mini`; other models have none.
        answer_tokens: it generates at most so many; 0 = only the prompt's rows count.
        layers: how many of its layers count, from the first; None = all. Without an answer the others do not run.
        shared: whether the guide has the tower, projector and word embeddings of the model, which then run once and
            cost the guide nothing; None = where they hold the same weights. "self" always shares.
        importance: [B, V] of the visual tokens of the prompts, instead of a guide.
    """

    guide: Any = None
    answer_tokens: int = 16
    layers: int | None = None
    shared: bool | None = None
    importance: Any = None

    name: ClassVar[str] = "sgl"
    needs_text: ClassVar[bool] = True
    lowest_k: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("answer_tokens", 0), ("layers", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"{option} {value} is too small. Use at least {least}")
        if self.importance is not None:
            if self.guide is not None:
                raise ValueError("importance and guide exclude each other. Use one of them")
            if not isinstance(self.importance, Tensor) or self.importance.dim() != 2:
                raise ValueError("importance must be a tensor [B, V], of the visual tokens of each prompt")
        if isinstance(self.guide, str) and self.guide == "self" and self.shared is False:
            raise ValueError('guide="self" shares its tower. Leave shared out')

    def attach(self, family: Family) -> Guiding:
        if self.importance is not None:
            return Guiding(family, None, True)
        found, shared = find_guide(self.guide, self.shared, family)
        return Guiding(family, Guide(found, self.answer_tokens, self.layers), shared)

    def look_ahead(self, attached: Guiding, input_ids, visual, arguments: dict) -> None:
        attached.asked = None
        if attached.shared or visual is None or not has_pixels(arguments, RAW_PIXELS):
            return
        if input_ids is None or arguments.get("inputs_embeds") is not None:
            raise ValueError("a guide with weights of its own reads input_ids. Use them instead of inputs_embeds")
        seen = visual.cpu().numpy()[:, -input_ids.shape[1] :]
        if self.stages(seen.sum(1).tolist(), attached.family.n_layers, attached):
            with part(GUIDE):
                attached.ask(arguments, input_ids, seen)

    def forget(self, attached: Guiding) -> None:
        attached.asked = None

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        if self.stages(prefill.prompt.counts, prefill.family.n_layers, prefill.attached):
            prefill.scratch["importance"] = self._importance(prefill, embeddings)

    def _importance(self, prefill: Prefill, embeddings: Tensor) -> Tensor:
        """[B, L] by the rows of the call."""
        attached, prompt = prefill.attached, prefill.prompt
        if self.importance is not None:
            return _placed(self.importance.to(prefill.device), prompt.visual)
        if not attached.shared:
            if attached.asked is None:
                raise ValueError(
                    "a guide with weights of its own needs the pictures. Pass input_ids and pixel values together"
                )
            found = attached.asked.repeat_interleave(prefill.batch // len(attached.asked), 0)  # beams
            return F.pad(found, (0, prompt.length - found.shape[1])).to(prefill.device)
        own = np.arange(prompt.length) <= np.array(prompt.last)[:, None]  # not what was generated
        with part(GUIDE), attached.undisturbed():
            asked = attached.guide.ask(Prompts.aligned(embeddings, prompt.real & own, prompt.visual))
        return asked.importance

    def score(self, stage: Stage) -> Tensor:
        rows, source = stage.visual_index, stage.prefill.source
        if source is not None:  # another sample of the batch was pruned at an earlier layer
            rows = source.gather(1, rows)
        return stage.prefill.scratch["importance"].to(rows.device).gather(1, rows)


@dataclass
class Guiding:
    """A guide beside the model that it guides.

    Attributes:
        family: of the model.
        guide: None where the importance is given.
        shared: whether the guide reads the embeddings that the model has made.
        asked: [B, L] importance by the rows of the call, or of the prompt of generate(), that is being made.
    """

    family: Family
    guide: Guide | None
    shared: bool
    asked: Tensor | None = None

    def undisturbed(self) -> AbstractContextManager:
        """Let the guide run without the method's hooks, where it is the model itself."""
        own = self.guide is not None and self.guide.family.decoder is self.family.decoder
        return asleep(self.family.decoder) if own else nullcontext()

    def ask(self, arguments: dict, input_ids: Tensor, visual: np.ndarray) -> None:
        """Ask a guide that reads the call itself.

        Raises:
            ValueError: it is being pruned, or the call does not say in two dimensions what is padding.
        """
        if owned(self.guide.family.decoder):
            raise ValueError("a method is active on the guide, which must see everything. Leave its `with` block first")
        real = real_tokens(arguments.get("attention_mask"), input_ids, self.family)
        pixels = {name: arguments.get(name) for name in RAW_PIXELS}
        embeds = self.guide.embed({"input_ids": input_ids, **pixels})
        self.asked = self.guide.ask(Prompts.aligned(embeds, real, visual)).importance


def _placed(importance: Tensor, visual: np.ndarray) -> Tensor:
    """[B, L] with the importance [B or fewer, V] of visual tokens where these are.

    Raises:
        ValueError: it is of another shape.
    """
    batch, most = len(visual), int(visual.sum(1).max())
    if importance.shape[1] != most or batch % len(importance):
        raise ValueError(
            f"importance is {list(importance.shape)}, the prompts have {batch} x {most} visual tokens. Use as many"
        )
    importance = importance.repeat_interleave(batch // len(importance), 0)
    flags = torch.from_numpy(visual).to(importance.device)
    at = (flags.long().cumsum(1) - 1).clamp(min=0)
    return importance.gather(1, at).masked_fill(~flags, 0)


@dataclass
class Surety:
    """How sure the guide is of its answers (SEE, the paper's section 3.3).

    Attributes:
        confidence: geometric mean of the probabilities of the new tokens, per sample.
        consistency: probability of the whole answer once most visual tokens are gone, per sample; a product, not
            normalised by its length.
        logits: [B, n, vocabulary] behind `consistency`.
    """

    confidence: list[float]
    consistency: list[float]
    logits: Tensor

    @property
    def score(self) -> list[float]:
        """The mean of both per sample: above a threshold the guide's answer is taken."""
        return [(a + b) / 2 for a, b in zip(self.confidence, self.consistency, strict=True)]


def surety(guide: Guide, prompts: Prompts, answers: Answers, ratio: float = 0.05) -> Surety:
    """Ask the guide for its own answers once more, showing it only the most important visual tokens.

    Args:
        guide, prompts, answers: what was asked, and what came of it.
        ratio: share of each prompt's visual tokens that it sees, int(ratio * n), from layer 0 on.

    Raises:
        ValueError: the guide gave no answers (`answer_tokens` 0).
    """
    if not answers.ids.shape[1]:
        raise ValueError("a guide that answers nothing cannot be sure of it. Use answer_tokens of at least 1")
    visual = np.zeros_like(prompts.visual)
    np.put_along_axis(visual, prompts.index, prompts.visual, 1)
    order = rank_by_score(answers.importance, torch.from_numpy(visual).to(answers.importance.device)).cpu().numpy()
    keep = np.zeros_like(visual)
    for b, n in enumerate(visual.sum(1)):
        keep[b, order[b, : int(ratio * n)]] = True
    logits = guide.score_answer(prompts, keep, answers.ids)
    chosen = logits.log_softmax(-1).gather(2, answers.ids[..., None])[..., 0]
    consistency = [float(row[:n].sum().exp()) for row, n in zip(chosen, answers.lengths, strict=True)]
    return Surety(answers.confidence, consistency, logits)
