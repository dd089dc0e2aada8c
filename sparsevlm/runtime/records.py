"""Working out trace records from the tensors of a prefill, when somebody looks at them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
    visual_index: Tensor,
    source: Tensor,
    merged_sources: tuple[Tensor, ...],
    visual: np.ndarray,
) -> tuple[list, list, list]:
    """Scores, kept positions and original indices of one stage, per sample; see `trace.StageRecord`.

    Args:
        scores, order: [B, V] scores and ranking; None if nothing had to be scored.
        keep, n_visual: kept and entering tokens; both 0 for a sample that is left alone.
        whole: visual tokens of samples that are left alone, else 0.
        visual_index [B, V], source [B, L]: as they were on entering.
        merged_sources: `source` of the tokens merged at earlier stages, [B, n] each.
        visual: [B, L0] bool, the tokens of the prompt that may be dropped.
    """
    all_scores, all_kept, all_origin = [], [], []
    for b, (k, n) in enumerate(zip(keep, n_visual, strict=True)):
        if whole[b]:
            kept = origin = torch.arange(whole[b])
        else:
            kept = torch.arange(n) if order is None or k == n else order[b, :k].sort().values.cpu()
            row = visual_index[b].cpu()[kept]
            ordinal = torch.from_numpy(visual[b].cumsum() - 1)
            origin = ordinal[source[b].cpu()[row]]
            for merged in merged_sources:
                origin = origin.masked_fill(torch.isin(source[b].cpu()[row], merged[b].cpu()), -1)
        all_scores.append(None if scores is None or whole[b] else scores[b, :n])
        all_kept.append(kept)
        all_origin.append(origin)
    return all_scores, all_kept, all_origin
