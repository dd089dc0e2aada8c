"""Letting the projections of a pruning layer take what scoring has computed of them already."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsevlm.runtime.families import PROJECTIONS

if TYPE_CHECKING:
    from sparsevlm.runtime.hooks import Hooks


class Projections:
    """Hooks on the projections of pruning layers; the other layers stay without, which would slow each decode step."""

    def __init__(self, hooks: Hooks):
        self.hooks = hooks
        self.hooked: set[int] = set()  # layers

    def hook(self, layers: list[int]) -> None:
        """Install them in the given layers; -1 stands for none."""
        for i in {*layers} - self.hooked - {-1}:
            self.hooked.add(i)
            attention = self.hooks.family.decoder.layers[i].self_attn
            for name in PROJECTIONS:
                module = getattr(attention, name)
                self.hooks.handles.append(module.register_forward_pre_hook(partial(self._shorten, i, name)))
                self.hooks.handles.append(module.register_forward_hook(partial(self._complete, i, name)))

    def _shorten(self, i: int, name: str, module: nn.Module, args: tuple):
        """Pre-hook of a projection: leave out the last rows, whose output is there."""
        made = self._handed(i, name)
        return None if made is None else (args[0][:, : args[0].shape[1] - made.shape[1]],)

    def _complete(self, i: int, name: str, module: nn.Module, args: tuple, out: Tensor):
        """Forward hook of it: add them."""
        made = self._handed(i, name)
        if made is None:
            return None
        return torch.cat([out, made], 1) if out.shape[1] else made

    def _handed(self, i: int, name: str) -> Tensor | None:
        prefill = self.hooks.prefill
        handed = prefill.handed if prefill is not None else None
        return handed.outputs.get(name) if handed is not None and handed.layer == i else None
