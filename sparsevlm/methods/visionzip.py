"""VisionZip (arXiv 2412.04467, CVPR 2025): dominant tokens by CLS attention, the others merged into contextual ones.

1. Dominant: CLS and the patches that CLS attends to most, in the layer whose output the language model reads (the last
   but one in LLaVA-1.5; attention summed over heads), in their order.
2. Of the remaining tokens every k-th, at a uniform stride, is a target; each other one joins the target whose key (mean
   over heads, same layer) is closest by cosine; a contextual token is the target plus the mean of those that joined it.
3. The projector gets the dominant tokens, then the contextual ones.

Source: the authors' repository (Apache-2.0), compared with recorded runs of it. Published splits of 192, 128, 64 tokens
are 162 + 30, 108 + 20, 54 + 10; for other budgets contextual = round(5/32 budget), which gives these three and those of
LLaVA-NeXT (108 + 20, 54 + 10, 27 + 5).

Deviations: only the CLS row of the attention is computed, in float32; equal scores go by index. CLS counts among the
tokens although LLaVA's own features do not contain it, as in the authors' code. With a budget several pictures, or the
frames of a video, share it; `dominant` and `contextual` are meant per picture, as the authors' are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.budget import in_tokens
from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class VisionZip(VisionMethod):
    """Dominant and contextual tokens.

    Attributes:
        dominant: tokens kept per picture, CLS among them; instead of a budget.
        contextual: merged tokens per picture; together with `dominant`.
    """

    dominant: int | None = None
    contextual: int | None = None

    name: ClassVar[str] = "visionzip"
    captures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dominant is None) != (self.contextual is None):
            raise ValueError("dominant and contextual go together. Use both of them, or a budget")
        if self.dominant is None or self.contextual is None:
            return
        if self.budget is not None:
            raise ValueError("budget and dominant exclude each other. Use a budget, or dominant and contextual")
        if self.dominant < 1 or self.contextual < 0:
            raise ValueError(
                f"dominant {self.dominant} must be at least 1 (CLS is one of them), "
                f"contextual {self.contextual} at least 0"
            )

    @property
    def active(self) -> bool:
        return self.dominant is not None or super().active

    def spend(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        if self.dominant is None or self.contextual is None:
            return super().spend(sizes, n_layers)
        total = self.dominant + self.contextual
        return [in_tokens(total, size) for size in sizes]

    def split(self, count: int) -> tuple[int, int]:
        """Return the dominant and contextual tokens of a picture that gets `count`."""
        contextual = (5 * count + 16) // 32 if self.contextual is None else self.contextual
        return count - contextual, contextual

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        dominant, contextual = self.split(count)
        scores = pictures.cls_attention().sum(1)
        order = rank_by_score(scores) + 1  # among all tokens, of which 0 is CLS
        chosen = order[:, : dominant - 1].sort(1).values
        cls = torch.zeros_like(order[:, :1])
        rest = order[:, dominant - 1 :].sort(1).values
        assert pictures.states is not None  # because of `captures`
        rows = [take(pictures.states, torch.cat([cls, chosen], 1))]
        if contextual:
            rows.append(contextual_tokens(take(pictures.states, rest), take(pictures.mean_keys(), rest), contextual))
        n, kept = chosen.shape[0], chosen - 1
        merged = kept.new_full((n, contextual), -1)
        if pictures.tower.cls:  # CLS is one of the model's visual tokens
            return Reduced(torch.cat(rows, 1), torch.cat([cls, chosen, merged], 1), _with_cls(scores), contextual)
        return Reduced(torch.cat(rows, 1), torch.cat([cls - 1, kept, merged], 1), scores, contextual + 1)


def contextual_tokens(states: Tensor, keys: Tensor, count: int) -> Tensor:
    """Merge [n, m, d] tokens into [n, count, d] by their keys [n, m, c]: targets plus the mean of those that join."""
    m = states.shape[1]
    stride = max(1, m // count)
    targets = list(range(0, m, stride))[:count]
    others = sorted({*range(m)} - {*targets})
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    group = (unit[:, others] @ unit[:, targets].transpose(1, 2)).argmax(-1)
    member = (group[:, None] == torch.arange(len(targets), device=group.device)[:, None]).to(unit.dtype)
    mean = member @ states[:, others].to(unit.dtype) / member.sum(-1, keepdim=True).clamp(min=1)
    return (states[:, targets] + mean).to(states.dtype)


def _with_cls(scores: Tensor) -> Tensor:
    """Prepend the score of CLS, which always stays."""
    return F.pad(scores, (1, 0), value=float("inf"))
