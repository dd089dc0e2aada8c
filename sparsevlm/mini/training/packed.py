"""Attention of questions that share one picture: each is a block that sees the picture and itself."""

import torch
from transformers import AttentionInterface

from sparsevlm.mini.training.batches import QUESTION_TOKENS

#: Its name for `set_attn_implementation`.
PACKED = "packed_questions"
_TILE = 200  # rows of the shared part that are computed at once


def packed_positions(shared: torch.Tensor, behind: int, blocks: int) -> torch.Tensor:
    """Positions of the whole row: those of the shared tokens, then the same ones for each block.

    Args:
        shared: int64 ``[B, S]``, the positions of what the blocks share.
        behind: where every block begins, as if it were alone.
        blocks: how many there are.

    Returns:
        int64 ``[B, S + blocks * 12]``.
    """
    block = torch.arange(behind, behind + QUESTION_TOKENS, device=shared.device)
    return torch.cat([shared, block.repeat(len(shared), blocks)], 1)


def packed_attention(module, query, key, value, attention_mask, scaling, shared: int, **_):
    """Causal attention in which a block of 12 tokens sees the first ``shared`` tokens and itself, not other blocks.

    What eager attention gives with that mask, without the two thirds of the products which the mask would discard.

    Args:
        query, key, value: ``[B, heads, L, width]`` with as many key heads as query heads; ``L - shared`` a multiple
            of 12.
        attention_mask: not looked at.
        scaling: of the products.
        shared: tokens which all blocks see, the first of the row.

    Returns:
        ``[B, L, heads, width]``, and None for the weights, as transformers wants it.
    """
    out = []
    for low in range(0, shared, _TILE):
        high = min(low + _TILE, shared)
        logits = query[:, :, low:high] @ key[:, :, :high].mT * scaling
        order = torch.arange(high, device=query.device)
        logits = logits.masked_fill(order[None] > order[low:, None], float("-inf"))
        out.append(_weigh(logits, value.dtype) @ value[:, :, :high])
    query, own_key, own_value = (x[:, :, shared:] for x in (query, key, value))
    blocks = (-1, QUESTION_TOKENS)
    order = torch.arange(QUESTION_TOKENS, device=query.device)
    own = query.unflatten(2, blocks) @ own_key.unflatten(2, blocks).mT * scaling
    own = own.masked_fill(order[None] > order[:, None], float("-inf")).flatten(2, 3)
    weights = _weigh(torch.cat([query @ key[:, :, :shared].mT * scaling, own], -1), value.dtype)
    result = weights[..., :shared] @ value[:, :, :shared]
    result = result + (weights[..., shared:].unflatten(2, blocks) @ own_value.unflatten(2, blocks)).flatten(2, 3)
    out.append(result)
    return torch.cat(out, 2).transpose(1, 2), None


def _weigh(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.float32).to(dtype)


AttentionInterface.register(PACKED, packed_attention)
