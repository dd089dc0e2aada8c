"""DART: stop looking for important tokens, duplication matters more (Wen et al., EMNLP 2025, arXiv 2502.11494).

1. Layers 0 ... K - 1 see every visual token. Pivots are the 4 visual tokens and the 4 text tokens (of those after the
   image) whose keys in layer K - 1, rotated, have the largest L1 norm over all heads.
2. For one pivot after the other, the visual tokens *least* similar to it that are not kept yet are kept: cosine of the
   states that enter layer K, after the model's final norm (authors' `get_retained_image_token`).
3. Visual pivots and what was kept for the 8 pivots go on, in their order and with their original position ids.

No attention is looked at, so the text has a say through four pivots only.

Deviations from the authors' code: it keeps int(n (1 - R) / 8) tokens per pivot and the visual pivots on top (R = 0.778:
4 + 8 * 15 = 124 of 576, as `keep=124` does here); here exactly `keep` tokens stay: what is left after the visual pivots
is shared out evenly among all pivots, the first ones get one more. The authors take the pivots in the order of a Python
set; here visual ones come first, then text, by position. Prompts with fewer text tokens than pivots use all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods.bases import PruneOnce
from sparsevlm.runtime.stage import Stage


@dataclass(frozen=True)
class DART(PruneOnce):
    """DART. `k`, `keep` and `match` as in `PruneOnce` (the authors' K is 2); `early_drop` has no effect here.

    The scores in the trace are the order in which tokens were chosen: 0 for visual pivots, then -1, -2, ...

    Attributes:
        visual_pivots, text_pivots: how many pivots of each kind.
    """

    visual_pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    scores_next: ClassVar[bool] = True
    scores_entered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_pivots < 1 or self.text_pivots < 0:
            raise ValueError(f"visual_pivots {self.visual_pivots} must be at least 1, text_pivots at least 0")

    def score(self, stage: Stage) -> Tensor:
        assert stage.prefill.entered is not None  # because of `scores_entered`
        keys = replace(stage, module=stage.layer, hidden=stage.prefill.entered).module_inputs().keys
        size = keys.to(torch.promote_types(keys.dtype, torch.float32)).abs().sum((1, 3))  # [B, L]
        states = stage.prefill.family.decoder.norm(stage.hidden).to(size.dtype)
        states = nn.functional.normalize(states, dim=-1)
        tail = stage.prefill.tail
        start = states.shape[1] - tail
        text_valid = stage.prefill.text_valid
        keep = self.keep_counts(stage)
        from_visual = [min(self.visual_pivots, n) for n in keep]
        from_text = [min(self.text_pivots, n) for n in stage.prefill.prompt.text.sum(1).tolist()]
        visual = take(states, stage.visual_index)
        first, first_real = _largest(size.gather(1, stage.visual_index), stage.visual_valid, from_visual)
        second, second_real = _largest(size[:, start:], text_valid, from_text)
        pivots = torch.cat([take(visual, first), take(states[:, start:], second)], 1)
        columns = first.shape[1], second.shape[1]
        shares = [_share(k - v, v, t, columns) for k, v, t in zip(keep, from_visual, from_text, strict=True)]
        free = torch.ones_like(visual[..., 0], dtype=torch.bool) if stage.visual_valid is None else stage.visual_valid
        chosen = torch.zeros_like(free).scatter(1, first, first_real)
        return least_similar(visual, pivots, torch.tensor(shares, device=visual.device), free & ~chosen, chosen)


def least_similar(visual: Tensor, pivots: Tensor, shares: Tensor, free: Tensor, chosen: Tensor) -> Tensor:
    """Choose for one pivot after the other the free visual tokens least similar to it.

    Args:
        visual: [B, V, D] of unit length.
        pivots: [B, P, D] of unit length.
        shares: [B, P] int64, tokens to choose for each pivot.
        free: [B, V] bool, tokens that may be chosen.
        chosen: [B, V] bool, tokens that are chosen already.

    Returns:
        [B, V] float: 0 for those, -1, -2, ... in the order of choice, one less for all that were not chosen.
    """
    score = torch.where(chosen, 0, -1 - shares.sum(1, keepdim=True))
    before = shares.cumsum(1) - shares
    for j in range(pivots.shape[1]):
        similarity = (visual @ pivots[:, j, :, None])[..., 0].masked_fill(~free, float("inf"))
        rank = similarity.sort(dim=1, stable=True).indices.argsort(1)
        now = rank < shares[:, j, None]
        score = torch.where(now, -1 - before[:, j, None] - rank, score)
        free = free & ~now
    return score.to(visual.dtype)


def _largest(size: Tensor, valid: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return indices [B, P] of the `counts` largest entries of each row, ascending, and which are real [B, P]."""
    width = max(counts)
    column = torch.arange(width, device=size.device)
    real = column < torch.tensor(counts, device=size.device)[:, None]
    index = rank_by_score(size, valid)[:, :width]
    order = (index + ~real * size.shape[1]).argsort(dim=1, stable=True)
    return index.gather(1, order), real


def _share(rest: int, visual: int, text: int, columns: tuple[int, int]) -> list[int]:
    """Return how many of `rest` tokens each pivot chooses: visual pivots, 0 for missing ones, text pivots, 0."""
    count = visual + text
    each = [rest // count + (i < rest % count) for i in range(count)] if count else []
    return each[:visual] + [0] * (columns[0] - visual) + each[visual:] + [0] * (columns[1] - text)
