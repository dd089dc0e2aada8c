"""Position ids of several axes (M-RoPE of the Qwen models), and calls whose positions such a model would get wrong.

A picture's tokens have a time, a row and a column; the text after them goes on behind the largest. Survivors keep all
of them whatever a method's `positions` says: there is no "next" number that renumbering could give them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevlm.runtime.cache_state import CacheState, seen_tokens
from sparsevlm.runtime.families import Family

_GRIDS = ("image_grid_thw", "video_grid_thw")


def counted(family: Family, position_ids: Tensor | None) -> Tensor | None:
    """Position ids of a call in which a jump means another sequence in the same row.

    With several axes that is a first of four planes, which counts tokens; three planes jump at every picture.
    """
    if family.axes == 1 or position_ids is None:
        return position_ids
    return position_ids[0] if position_ids.dim() == 3 and position_ids.shape[0] > family.axes else None


def check_pictures(family: Family, ids: Tensor | None, kwargs: dict) -> None:
    """Refuse a prompt with pictures for which the model could not work out positions of several axes.

    Args:
        ids: input_ids of the call or of generate().
        kwargs: its arguments.

    Raises:
        ValueError: the model would go on with positions of one axis, or fail with an error that does not say why.
    """
    if family.axes == 1 or kwargs.get("position_ids") is not None:
        return
    if ids is None:
        raise ValueError(
            f"without input_ids this {family.outer.config.model_type} model cannot tell rows and columns of pictures "
            "and numbers all tokens one after the other. Pass input_ids and mm_token_type_ids, or position_ids"
        )
    if kwargs.get("mm_token_type_ids") is None or all(kwargs.get(name) is None for name in _GRIDS):
        raise ValueError(
            f"without mm_token_type_ids and {' or '.join(_GRIDS)} this {family.outer.config.model_type} model numbers "
            "the tokens of pictures one after the other and answers worse without saying so. Pass all that the "
            "processor returns"
        )
    if seen_tokens(kwargs.get("past_key_values")):
        raise ValueError(
            f"a {family.outer.config.model_type} model cannot number a new picture that goes on with a cache. Pass the "
            "whole conversation without past_key_values, or position_ids"
        )


def check_step(family: Family, rope: tuple[Tensor, Tensor], length: int, state: CacheState | None, own: bool) -> None:
    """Refuse a call without pictures whose positions are those of other tokens.

    Args:
        rope: cos and sin [B, N, d] that the model made.
        length: tokens of the call.
        state: of its cache.
        own: whether the model worked the positions out, which it does from its last picture, not from the cache.

    Raises:
        ValueError: an attention_mask for the whole sequence numbered all of it anew, or another prompt came between.
    """
    if family.axes == 1:
        return
    if rope[0].shape[1] != length:
        raise ValueError(
            f"this {family.outer.config.model_type} model numbers one token for each entry of attention_mask, and "
            f"{rope[0].shape[1]} entries came with {length} tokens. Use generate(), or pass position_ids"
        )
    if state is None or not own or state.deltas is None:
        return
    now = family.outer.rope_deltas
    if now is not state.deltas and (now is None or not torch.equal(now, state.deltas)):
        raise ValueError(
            f"this {family.outer.config.model_type} model remembers where the text goes on of one prompt only, and "
            "another came since this cache was begun. Use generate(), or pass position_ids"
        )
