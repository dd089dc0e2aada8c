"""Base of the methods that merge tokens inside the blocks of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.blocks import Blocks, Tokens
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Tower, Vision


@dataclass
class BlockMethod(VisionMethod):
    """A subclass says in which blocks it acts and computes them, by `self.run(tower)`'s attend() and mlp()."""

    def layers(self, tower: Tower) -> range:
        """Encoder layers to compute; the last one is `tower.layer`."""
        raise NotImplementedError

    def block(self, i: int, layer: nn.Module, tokens: Tokens, tower: Tower) -> None:
        """Compute layer `i` for `tokens`, which end with fewer tokens than the tower has patches."""
        raise NotImplementedError

    def run(self, tower: Tower) -> Blocks:
        return self._runs[tower.kind]

    def hooks(self, family) -> list[RemovableHandle]:
        self._runs: dict[str, Blocks] = {}
        return super().hooks(family)

    def tower_hooks(self, vision: Vision, tower: Tower) -> list[RemovableHandle]:
        self._runs[tower.kind] = Blocks(self, vision, tower, self.layers(tower))
        return self._runs[tower.kind].handles()

    def encode(self, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        return self.run(encoding.tower).reduced()
