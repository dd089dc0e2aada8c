"""Common parts of FiCoCo-V and FiCoCo-L (kawhiiiileo/FiCoCo, 8995e93; no licence, nothing of it was used)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VARIANTS = ("paper", "code")


def code_weights(logits: Tensor, eps: float, counts: Sequence[int]) -> Tensor:
    """Compute how much of each discarded token goes to which token, as the authors' code does.

    The targets of a row are the tokens above its eps-quantile (linear interpolation), as many for every row as that
    makes where no two correlations are equal; shares are those of a softmax, made to sum to one. Targets may be tokens
    that are discarded themselves, for that is how the code has it.

    Args:
        logits: [n, g, t] correlation of g discarded tokens with all t tokens, -inf with those that are none.
        eps: quantile.
        counts: of each sample the tokens that there are, known to the host.

    Returns:
        [n, g, t] shares; rows sum to one (to zero where nothing is above the quantile).
    """
    targets = [n - 1 - int(eps * (n - 1) + 1e-9) if n else 0 for n in counts]
    value, place = logits.softmax(-1).topk(max(targets), dim=2)
    if min(targets) != max(targets):
        column = torch.arange(max(targets), device=value.device)
        value = value * (column < torch.tensor(targets, device=value.device)[:, None, None])
    shares = value / value.sum(2, keepdim=True)
    return torch.zeros_like(logits).scatter(2, place, shares)
