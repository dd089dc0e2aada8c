"""What a caller gives to a forward: where its visual tokens are, and what pruning could not follow.

Every refusal comes before a layer has computed anything, and says what to use instead.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from sparsevlm.runtime.cache_state import CacheState, seen_tokens
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.masks import padding_from

RAW_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
_PIXELS = (*RAW_PIXELS, "mm_encoder_outputs")
_blocks = count(1)


def has_pixels(kwargs: dict, names: tuple[str, ...] = _PIXELS) -> bool:
    """Whether a call brings pictures; generate() passes an empty dict of encoded ones for text alone."""
    given = (kwargs.get(name) for name in names)
    return any(v is not None and not (isinstance(v, dict) and all(x is None for x in v.values())) for v in given)


def placeholder_ids(family: Family, embeds: Tensor) -> Tensor:
    """[B, L] int64: ids of the placeholders among `embeds` [B, L, D], -1 for other tokens; the model's own rule.

    The LLaVA models take an embedding for a placeholder if it equals that of the placeholder's id.
    """
    ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
    for i in family.visual_ids:
        own = family.outer.get_input_embeddings()(torch.full((), i, device=embeds.device))
        ids = ids.masked_fill((embeds == own).all(-1), i)
    return ids


def visual_tokens(family: Family, ids: Tensor) -> Tensor:
    """[B, L] bool: which of the ids [B, L] are placeholders."""
    return sum(ids == i for i in family.visual_ids).bool()


def real_tokens(mask: Tensor | None, ids: Tensor, family: Family) -> np.ndarray:
    """[B, L] bool on the host: which of the new tokens `ids` of a call are no padding.

    Args:
        mask: attention_mask of the call, [B, L or more], None = all are real.

    Raises:
        ValueError: a mask that is not 2D, or none beside padding.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -ids.shape[1] :].cpu().numpy().astype(bool)
    padding = family.decoder.config.pad_token_id
    if mask is not None or (not ids.is_meta and padding is not None and bool((ids == padding).any())):
        raise ValueError("a guide must know what is padding. Pass a 2D attention_mask")
    return np.ones(tuple(ids.shape), bool)


def new_tokens(ids: Tensor, kwargs: dict) -> Tensor:
    """Those of the ids [B, L] given to `generate` that its cache does not hold (transformers: `_prefill`)."""
    mask = kwargs.get("attention_mask")
    whole = not isinstance(mask, Tensor) or mask.shape[1] == ids.shape[1]
    return ids[:, seen_tokens(kwargs.get("past_key_values")) :] if whole else ids


def refuse_unmarked(embeds: Tensor | None, cache) -> None:
    """Raise ValueError for embeddings that may hold features of pictures: a single token of a running text does not."""
    if embeds is not None and (embeds.shape[1] > 1 or not seen_tokens(cache)):
        raise ValueError(
            "inputs_embeds without pixel values do not show which tokens are visual. Enter the block with "
            "visual_mask=, a [B, L] bool tensor (all False for text alone), or pass input_ids and pixel values"
        )


class GivenMask:
    """The `visual_mask` of a block: it marks the visual tokens of one prompt, which may run in the block repeatedly.

    Attributes:
        mask: [B, L] bool.
        block: number of the block, noted on the caches that this prompt starts (`CacheState.block`).
    """

    def __init__(self, mask: Tensor):
        self.mask, self.block = mask, next(_blocks)

    def of(self, tokens: Tensor, cache, generated: bool) -> Tensor | None:
        """[B, length] bool for a call with these tokens; None for one that goes on with the prompt.

        Args:
            tokens: [B, length, ...] ids or embeddings.
            cache: of the call.
            generated: inside generate(): beams repeat the prompt, candidates and generated tokens may follow it.

        Raises:
            ValueError: tokens of another shape than the prompt's.
        """
        batch, length = tokens.shape[:2]
        if seen_tokens(cache) and (length == 1 or getattr(getattr(cache, "sparsevlm", None), "block", 0) == self.block):
            return None
        rows, own = self.mask.shape
        if batch % rows if generated else batch != rows:
            raise ValueError(f"visual_mask has {rows} rows, the input {batch}; {_NEW_BLOCK}")
        if length < own if generated else length != own:
            raise ValueError(f"visual_mask is for {own} tokens, the input has {length}; {_NEW_BLOCK}")
        mask = self.mask if batch == rows else self.mask.repeat_interleave(batch // rows, 0)
        return mask if length == own else nn.functional.pad(mask, (0, length - own))

    def check_prompt(self, prompt: Tensor) -> None:
        """Raise ValueError unless generate() gets the mask's own prompt [B, L, ...], or goes on with a cache."""
        rows, own = self.mask.shape
        if prompt.shape[0] != rows:
            raise ValueError(f"visual_mask has {rows} rows, the input {prompt.shape[0]}; {_NEW_BLOCK}")
        if prompt.shape[1] != own:
            raise ValueError(f"visual_mask is for {own} tokens, the input has {prompt.shape[1]}; {_NEW_BLOCK}")

    def check_placeholders(self, visual: Tensor, placeholders: Tensor) -> None:
        """Raise ValueError if `visual` [B, L] marks tokens that are no placeholders of a call with pixel values."""
        if not placeholders.is_meta and bool((visual.to(placeholders.device) & ~placeholders).any()):
            raise ValueError(
                f"visual_mask marks tokens that are no placeholders of pictures; {_NEW_BLOCK}, or without visual_mask"
            )


_NEW_BLOCK = "enter a new block with that prompt's mask"


def check_backend(family: Family, original: bool) -> None:
    """Refuse backends that cannot compute shortened layers; `original`: survivors keep their positions.

    Raises:
        NotImplementedError: flex_attention, which gave wrong results for layers of different lengths; FlashAttention
            where a sliding window has to count dropped tokens.
    """
    implementation = family.decoder.config._attn_implementation
    if "flash" in implementation and original and family.sliding:
        raise NotImplementedError(
            "FlashAttention counts a sliding window in the tokens that are left, but these keep their positions; "
            "call model.set_attn_implementation('sdpa') first, or use positions='renumber'"
        )
    if implementation == "flex_attention":
        raise NotImplementedError(
            "flex_attention cannot run layers of different lengths; call model.set_attn_implementation('sdpa') first"
        )


def check_positions(position_ids: Tensor | None, real: np.ndarray, packed: bool, renumber: bool) -> None:
    """Refuse position ids of the caller's own that jump, where pruning could not do the same as the model.

    Args:
        position_ids: [1 or B, L] as the caller gave them, None = the model's own.
        real: [B, L] bool, False = padding.
        packed: whether the model would take a jump for the beginning of another sequence in the same row.
        renumber: whether the method numbers the survivors anew.

    Raises:
        NotImplementedError: they jump, and one of the two holds.
    """
    if position_ids is None or position_ids.is_meta or not (packed or renumber):
        return
    steps = position_ids.diff(dim=-1).cpu().numpy()
    inside = real[:, 1:] & real[:, :-1]
    if not ((steps != 1) & inside).any():
        return
    if packed:
        raise NotImplementedError(
            "position_ids that jump mean several sequences packed into one row, which pruning cannot follow; pass one "
            "sequence per row, padded, with its attention_mask"
        )
    raise NotImplementedError(
        "position_ids that jump cannot be renumbered for fewer tokens; leave position_ids to the model, or use "
        "positions='original'"
    )


def check_mask(mask, family: Family, key_mask: Tensor | None, past: int, length: int) -> None:
    """Refuse a mask of the caller's own that is more than causal and padding.

    Args:
        mask: attention_mask of the call: None and 2D masks pass; a 4D one [1 or B, 1 or H, length, >= past + length],
            bool or added to logits, or one for each kind of layer.
        key_mask: [B, past + length] bool, False = padding; None = all real.

    Raises:
        NotImplementedError: another mask, also a flex_attention one.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return
    windows = sorted({family.window(i) or 0 for i in range(family.n_layers)})
    if isinstance(mask, dict):
        pairs = [(m, family.decoder.config.sliding_window if "sliding" in kind else 0) for kind, m in mask.items()]
    else:
        pairs = [(mask, window) for window in windows]
    for own, window in pairs:
        if own is not None and not _is_plain(own, key_mask, past, length, window):
            raise NotImplementedError(
                "an attention_mask that is more than causal and padding cannot be followed once tokens are dropped; "
                "pass a 2D mask, or budget='full'"
            )


def _is_plain(mask, key_mask: Tensor | None, past: int, length: int, window: int) -> bool:
    """Whether a 4D mask is causal, with the padding of `key_mask` and a sliding window (0 = none), in real rows."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length or mask.shape[3] < past + length:
        return False
    allowed = mask
    if mask.dtype != torch.bool:
        allowed = mask == 0
        if not (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            return False
    column = torch.arange(mask.shape[3], device=mask.device)
    row = torch.arange(past, past + length, device=mask.device)[:, None]
    expected = (column <= row) & (row - column < window) if window else column <= row
    expected = expected[None, None]
    if key_mask is not None:
        key_mask = key_mask.to(mask.device)
        expected = expected & nn.functional.pad(key_mask, (0, mask.shape[3] - key_mask.shape[1]))[:, None, None]
        expected = expected | ~key_mask[:, None, -length:, None]  # what padding sees does not matter
        allowed = allowed | ~key_mask[:, None, -length:, None]
    return bool((allowed == expected).all())


def all_real(mask: Tensor) -> bool:
    """Whether a 2D mask is known to hide nothing; False also where finding out would wait for a device."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(mask.numpy().all())


def check_told(mask: Tensor | None, state: CacheState, n: int, wait: bool) -> None:
    """Refuse a 2D mask that hides, or shows, other tokens than the one with which a cache was pruned.

    Args:
        mask: [B, past + n] attention_mask of a call that goes on with the cache; None = all are real.
        state: of the cache.
        n: tokens of the call.
        wait: read a mask on a device, too.

    Raises:
        ValueError: it differs where tokens were dropped, or is missing though there is padding.
    """
    if mask is None:
        if state.padded:
            raise ValueError(
                "this cache holds padding, and the call does not say where. Pass attention_mask for all of its tokens "
                "and the new ones"
            )
        return
    old, given = mask[:, : min(state.told, mask.shape[1] - n)].bool(), state.given
    devices = {x.device.type for x in (old, given) if x is not None}
    if torch.compiler.is_compiling() or "meta" in devices or not (wait or devices == {"cpu"}):
        return
    given = torch.ones_like(old) if given is None else given[:, : old.shape[1]]
    if devices != {"cpu"}:
        old, given = old.cpu(), given.cpu()
    if not np.array_equal(old.numpy(), given.numpy()):
        raise ValueError(
            "attention_mask says something else of earlier tokens than when this cache was pruned, which cannot be "
            "followed: some of them are gone. Pass the same mask, longer, or start with a new cache"
        )


def key_mask_of(mask, layer_mask, past: int, held: int, length: int) -> Tensor | None:
    """[B, past + length] or [B, held + length] bool, which keys are real, from the call's attention_mask; None = all.

    Args:
        mask: attention_mask as the caller, or generate(), gave it.
        layer_mask: what layer 0 got.
        past, held: input tokens of earlier calls, and those that layer 0's cache holds.

    Raises:
        NotImplementedError: a mask of flex_attention.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return padding_from(mask, past, length)
    if not all(isinstance(m, Tensor | None) for m in (mask.values() if isinstance(mask, dict) else [mask])):
        raise NotImplementedError(
            "padding cannot be read from a mask of flex_attention; call model.set_attn_implementation('sdpa') first"
        )
    return padding_from(layer_mask, held, length)  # made for layer 0's cache
