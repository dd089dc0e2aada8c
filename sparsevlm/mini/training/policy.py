"""Attention of packed questions under a policy: decisions about shared tokens weigh keys instead of dropping them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface

from sparsevlm.core.policy import EPS, policy_weights
from sparsevlm.mini.training.batches import QUESTION_TOKENS
from sparsevlm.mini.training.packed import packed_attention

#: Its name for `set_attn_implementation`.
POLICY = "packed_questions_under_a_policy"
_TILE = 200  # rows of the shared part that are computed at once


@dataclass
class Policy:
    """What the layers are told.

    Attributes:
        rows: policy [B, shared] in [0, 1] of the shared tokens, by the first layer that it applies to.
        eps: of `core.policy.policy_weights`.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)
    eps: float = EPS

    def at(self, layer: int) -> Tensor | None:
        """Return the policy of a layer, None = every key counts in full."""
        first = max((start for start in self.rows if start <= layer), default=None)
        return None if first is None else self.rows[first]


def policy_attention(module, query, key, value, attention_mask, scaling, shared: int, policy: Policy, **_):
    """Compute `packed_attention` with the keys of the shared tokens weighed by a policy (MaskedSoftmax).

    A row of the shared part counts the shared tokens as its sequence; a block's row the shared tokens and its block.

    Args:
        query, key, value, shared: as for `packed_attention`; there may be no block.
        attention_mask: not looked at.
        scaling: of the products.
        policy: read at the module's layer. Tokens of the blocks always count.

    Returns:
        as `packed_attention`.
    """
    keep = policy.at(module.layer_idx)
    if keep is None:
        return packed_attention(module, query, key, value, None, scaling, shared)
    keep, eps = keep[:, None], policy.eps
    out = []
    for low in range(0, shared, _TILE):
        high = min(low + _TILE, shared)
        rows, columns = (torch.arange(n, device=query.device) for n in (high - low, high))
        logits = query[:, :, low:high] @ key[:, :, :high].mT * scaling
        logits = logits.masked_fill(columns > rows[:, None] + low, float("-inf"))
        own = columns == rows[:, None] + low
        weights, leak = policy_weights(logits, keep[..., :high], own, eps, shared - high)
        out.append(weights @ value[:, :, :high] + leak * value[:, :, high:shared].sum(2, keepdim=True))
    if query.shape[2] > shared:
        out.append(_blocks(query, key, value, scaling, shared, keep, eps))
    return torch.cat(out, 2).transpose(1, 2), None


def _blocks(query, key, value, scaling: float, shared: int, keep: Tensor, eps: float) -> Tensor:
    """Compute the rows [B, heads, blocks * 12, width] of the blocks."""
    shared_key, shared_value = key[:, :, :shared], value[:, :, :shared]
    query, key, value = (x[:, :, shared:].unflatten(2, (-1, QUESTION_TOKENS)) for x in (query, key, value))
    order = torch.arange(QUESTION_TOKENS, device=query.device)
    own = (query @ key.mT * scaling).masked_fill(order > order[:, None], float("-inf"))
    logits = torch.cat([query @ shared_key[:, :, None].mT * scaling, own], -1)
    every = torch.cat([keep, keep.new_ones(*keep.shape[:2], QUESTION_TOKENS)], -1)
    column = torch.arange(shared + QUESTION_TOKENS, device=query.device)
    weights, _ = policy_weights(logits, every[:, :, None], column == order[:, None] + shared, eps)
    return (weights[..., :shared] @ shared_value[:, :, None] + weights[..., shared:] @ value).flatten(2, 3)


AttentionInterface.register(POLICY, policy_attention)
