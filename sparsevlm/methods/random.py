"""Random visual tokens, chosen before the language model: the control that every method has to beat.

Survivors keep their original position ids, so that nothing but the choice of tokens differs from a method that prunes
inside the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsevlm.methods.bases import PruneAtInput
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class UniformDraw:
    """Scores visual tokens by a uniform draw; a method puts it before one of the bases and has an option `seed`.

    The draw is a hash of the seed, the token's index and the text after the image: another seed or question draws other
    tokens, and a sample gets the same ones alone and in any batch. (Embeddings of words are looked up, so their bits do
    not depend on the batch; those of the picture may.) Nothing waits for the device.
    """

    seed: int

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        tail = prefill.tail
        text = embeddings[:, embeddings.shape[1] - tail :].contiguous()
        words = torch.view_copy(text, dtype=_BITS[text.element_size()]).long().sum(-1)  # view breaks tracers
        place = torch.arange(tail, 0, -1, device=text.device)
        mixed = _mix(words + place * 0x9E3779B9)
        if prefill.text_valid is not None:
            # count from the last word of the prompt, wherever padding is
            behind = prefill.text_valid.long().flip(1).cumsum(1).flip(1)
            mixed = _mix(words + behind * 0x9E3779B9).masked_fill(~prefill.text_valid, 0)
        prefill.scratch["keys"] = mixed.sum(1, keepdim=True)

    def score(self, stage: Stage) -> Tensor:
        index = torch.arange(stage.visual_index.shape[1], device=stage.hidden.device)
        keys = stage.prefill.scratch["keys"].to(index.device)
        bits = _mix(_mix(keys + self.seed * 0x632BE5AB) + index * 0x9E3779B9)
        return (bits & 0xFFFFFF).float()  # 24 bits are exact in float32; ties go by index


@dataclass(frozen=True)
class Random(UniformDraw, PruneAtInput):
    """Keeps `budget` visual tokens, drawn uniformly at the language model's input.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"


def _mix(x: Tensor) -> Tensor:
    """Return a 64-bit integer hash (the finaliser of splitmix64; shifts are arithmetic, which serves as well)."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
