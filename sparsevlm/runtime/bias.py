"""What a method adds to the logits of the language model's attention, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.runtime.families import Family


@dataclass
class LogitBias:
    """Terms that are added to the logits before the softmax, the same for all heads.

    Attributes:
        first: [B, K] for the keys of layer 0; keys that come later get 0.
        later: [B, K] the same for all other layers.
        pairs: [B, L, L] for the L rows of the call that reads the picture and the last L keys of all layers; None = 0.
    """

    first: Tensor
    later: Tensor
    pairs: Tensor | None = None

    def keys_only(self) -> LogitBias:
        """What later calls add."""
        return LogitBias(self.first, self.later)

    def of_rows(self, choose: Callable[[Tensor], Tensor]) -> LogitBias:
        """The terms of other rows of the batch, which `choose` takes of each tensor."""
        return LogitBias(choose(self.first), choose(self.later), None if self.pairs is None else choose(self.pairs))

    def after(self, before: LogitBias | None, cached: int) -> LogitBias:
        """The same for a call whose keys come after `cached` ones of earlier calls, with what these were given."""
        if not cached:
            return self
        old = [self.first.new_zeros(self.first.shape[0], 0)] * 2 if before is None else [before.first, before.later]
        old = [_fit(x.to(self.first.device), cached) for x in old]
        return LogitBias(torch.cat([old[0], self.first], 1), torch.cat([old[1], self.later], 1), self.pairs)

    def added_to(self, mask: Tensor, layer: int, dtype: torch.dtype) -> Tensor:
        """Turn the mask [1 or B, 1, L, S] of a layer, bool or to be added to logits, into one with these terms."""
        keys = self.first if layer == 0 else self.later
        total = mask.shape[-1]
        bias = _fit(keys, total)[:, None, None]
        if self.pairs is not None:
            before = keys.shape[1] - self.pairs.shape[2]
            bias = bias + F.pad(self.pairs, (before, total - keys.shape[1]))[:, None]
        bias = bias.to(mask.device, dtype)
        if mask.dtype != torch.bool:
            return mask + bias
        return torch.where(mask, bias, torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device))


def _fit(keys: Tensor, length: int) -> Tensor:
    """[B, length]: zeros behind, or less."""
    return F.pad(keys, (0, length - keys.shape[1]))


def check_backend(family: Family) -> None:
    """Refuse backends, and models, in which nothing can be added to logits.

    Raises:
        NotImplementedError: another attention implementation than sdpa and eager, or sliding windows.
    """
    implementation = family.decoder.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise NotImplementedError(
            f"{implementation} cannot add to attention logits what this method adds. Call "
            "model.set_attn_implementation('sdpa') first, or use calibrate=False"
        )
    if family.sliding:
        raise NotImplementedError(
            "what this method adds to attention logits is not defined for sliding windows. Use calibrate=False"
        )
