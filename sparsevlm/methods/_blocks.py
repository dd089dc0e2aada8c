"""Base of the methods that merge tokens inside the blocks of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.blocks import Blocks, Tokens
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Tower, Vision


@dataclass(frozen=True)
class BlockMethod(VisionMethod):
    """Base for merging inside the tower: a subclass overrides `layers` and `block`, which uses attend() and mlp()."""

    def layers(self, tower: Tower) -> range:
        """Return the encoder layers to compute; the last one is `tower.layer`."""
        raise NotImplementedError

    def block(self, run: Blocks, i: int, layer: nn.Module, tokens: Tokens) -> None:
        """Compute layer `i` for `tokens`, which end with fewer tokens than the tower `run.tower` has patches."""
        raise NotImplementedError

    def tower_hooks(self, vision: Vision, tower: Tower) -> list[RemovableHandle]:
        run = vision.scratch[tower.kind] = Blocks(self, vision, tower, self.layers(tower))
        return run.handles()

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        run: Blocks = vision.scratch[encoding.tower.kind]
        return run.reduced()
