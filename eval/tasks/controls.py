"""Controls of the separation study, registered as methods: what is reached with the answer's place, or without text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsevlm.methods import register
from sparsevlm.methods.random import Random
from sparsevlm.methods.sparsevlm import SparseVLM, attention_of_all, paid_by_visual
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage


@register
@dataclass(frozen=True)
class Oracle(Random):
    """Keeps the tokens that show what the question is about, filled up with random ones, at the model's input.

    Attributes:
        targets: per sample of the coming batch, the indices of those visual tokens; an evaluation sets them.
    """

    targets: Sequence[Sequence[int]] = field(default=(), repr=False)

    name: ClassVar[str] = "oracle"

    def score(self, stage: Stage) -> Tensor:
        scores = super().score(stage)
        if len(self.targets) != len(scores):
            raise ValueError(f"oracle: {len(self.targets)} lists of targets for {len(scores)} samples; set `targets`")
        for row, targets in zip(scores, self.targets, strict=True):
            row[torch.as_tensor(targets, dtype=torch.long, device=row.device)] = 2.0**25  # above any random score
        return scores


@register
@dataclass(frozen=True)
class Saliency(SparseVLM):
    """SparseVLM rated by the picture instead of the text: the attention that visual tokens pay to one another.

    Same layers, same numbers of tokens, same recycling: what text guidance is worth is the difference to this.
    """

    name: ClassVar[str] = "saliency"

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        """No raters."""

    def score(self, stage: Stage) -> Tensor:
        return paid_by_visual(stage, attention_of_all(stage))
