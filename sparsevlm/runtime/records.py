"""Working out trace records from the tensors of a prefill, when somebody looks at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsevlm.runtime.rows import Block, Scattered


def rater_positions(raters: Tensor, length: int, n_visual: list[int]) -> list[Tensor]:
    """Positions in the input of the raters, given as [B, tail] bool over its last positions."""
    offset = length - raters.shape[1]
    empty = torch.empty(0, dtype=torch.long)
    return [row.nonzero()[:, 0].cpu() + offset if n else empty for row, n in zip(raters, n_visual, strict=True)]


def stage_details(
    scores: Tensor | None,
    order: Tensor | None,
    keep: list[int],
    n_visual: list[int],
    whole: list[int],
    rows: Block | Scattered,
    source: Tensor | None,
    merged_sources: tuple[Tensor, ...],
    visual: np.ndarray,
) -> tuple[list, list, list]:
    """Scores, kept positions and original indices of one stage, per sample; see `trace.StageRecord`.

    Args:
        scores, order: [B, V] scores and ranking; None if nothing had to be scored.
        keep, n_visual: kept and entering tokens; both 0 for a sample that is left alone.
        whole: visual tokens of samples that are left alone, else 0.
        rows, source: of the prefill, as they were on entering.
        merged_sources: `source` of the tokens merged at earlier stages, [B, n] each.
        visual: [B, L0] bool, the tokens of the prompt that may be dropped.
    """
    all_scores, all_kept, all_origin = [], [], []
    for b, (k, n) in enumerate(zip(keep, n_visual, strict=True)):
        if whole[b]:
            kept = origin = torch.arange(whole[b])
        else:
            kept = torch.arange(n) if order is None or k == n else order[b, :k].sort().values.cpu()
            row = rows.index[b].cpu()[kept]
            token = row if source is None else source[b].cpu()[row]
            origin = torch.from_numpy(visual[b].cumsum() - 1)[token]
            for merged in merged_sources:
                origin = origin.masked_fill(torch.isin(token, merged[b].cpu()), -1)
        all_scores.append(None if scores is None or whole[b] else scores[b, :n])
        all_kept.append(kept)
        all_origin.append(origin)
    return all_scores, all_kept, all_origin
