"""Choosing text tokens that rate the visual ones (SparseVLM section 3.1, eq. 5-6; modelling_sparse_llama.py:199)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevlm.core.precision import at_least_float32

RULES = ("paper", "all", "centred", "last")
NUMBER = "a number of text tokens of at least 1"


def select_raters(
    visual: Tensor,
    text: Tensor,
    visual_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    rule: str | int = "paper",
) -> Tensor:
    """Choose the raters among the text tokens, from the embeddings that enter the language model.

    `paper`: r = mean over visual tokens of softmax over *text* of H_v H_q^T (raw dot products, no 1/sqrt(d)); a text
    token rates if r exceeds the mean of r strictly. (The paper writes >=, the authors' code >; they differ only when
    r equals its mean exactly.) If no token exceeds the mean (one text token, or all alike) every text token rates;
    the authors' code then scores with no rater and yields NaN.
    `centred`: the same after subtracting the mean visual embedding; `all`: every text token; `last`: the last one; a
    number: so many text tokens, those with the highest r (the first of equals), or all where there are fewer.

    Args:
        visual: [B, V, D] embeddings of the visual tokens.
        text: [B, T, D] embeddings of the candidate text tokens.
        visual_valid, text_valid: [B, V], [B, T] bool, None = all.
        rule: one of RULES, or a number of raters, at least 1.

    Returns:
        [B, T] bool. Computed in float32 whatever the input (float64 stays).

    Raises:
        ValueError: unknown rule.
    """
    if not is_rule(rule):
        raise ValueError(f"unknown rater rule {rule!r}. Use {', '.join(RULES)}, or {NUMBER}")
    valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_valid is None else text_valid
    if rule == "all":
        return valid
    if rule == "last":
        position = torch.arange(text.shape[1], device=text.device)
        return valid & (position == torch.where(valid, position, -1).amax(1, keepdim=True))
    weights = relevance(visual, text, visual_valid, text_valid, centred=rule == "centred")
    if not isinstance(rule, str):
        order = weights.masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True)
        return valid & (order.argsort(1) < rule)
    chosen = weights > _mean(weights.unsqueeze(-1), text_valid)
    chosen = chosen if text_valid is None else chosen & text_valid
    return torch.where(chosen.any(1, keepdim=True), chosen, valid)


def is_rule(rule: str | int) -> bool:
    """Return whether `select_raters` takes it: one of RULES, or an integer of at least 1."""
    if isinstance(rule, int) and not isinstance(rule, bool):
        return rule >= 1
    return rule in RULES


def relevance(
    visual: Tensor,
    text: Tensor,
    visual_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    centred: bool = False,
) -> Tensor:
    """Compute r of eq. 5: mean over visual tokens of softmax over text of H_v H_q^T; `centred`: H_v less its mean.

    Args:
        visual, text, visual_valid, text_valid: as in `select_raters`.

    Returns:
        [B, T] float32 (float64 for such inputs), each row sums to one over its valid tokens.
    """
    dtype = at_least_float32(visual.dtype)
    visual, text = visual.to(dtype), text.to(dtype)
    if centred:
        visual = visual - _mean(visual, visual_valid).unsqueeze(1)
    similarity = visual @ text.transpose(1, 2)
    if text_valid is not None:
        similarity = similarity.masked_fill(~text_valid[:, None], torch.finfo(dtype).min)
    return _mean(similarity.softmax(-1), visual_valid)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Average [B, N, D] over the valid rows -> [B, D]."""
    if valid is None:
        return x.mean(1)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    return x.masked_fill(~valid[..., None], 0).sum(1) / count
