"""DeepStack (arXiv 2406.04334): features that the text model adds to visual tokens between its first layers.

Qwen3-VL adds them inside its forward, at the rows that were visual in the prompt (modeling_qwen3_vl.py,
`_deepstack_process`), which cannot be once rows are gone. In a block they are put aside before the text model runs, and
each is added before the next layer, thus before that layer's scores and drops, to the rows that are left. A merged
token gets the features of its centre.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparsevlm.core.packing import take
from sparsevlm.runtime.families import Family


class Injections:
    """Those of one call.

    Attributes:
        visual: [B, L] bool, rows of the call's input that get features; None = there are none.
        features: per layer [visual tokens of the batch, D], added to its output.
    """

    def __init__(self, family: Family):
        self.family = family
        self.forget()

    def forget(self) -> None:
        self.visual: Tensor | None = None
        self.features: list[Tensor] = []

    def take(self, module: nn.Module, args: tuple, kwargs: dict):
        """Pre-hook of the text model: put aside what it would add."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return None
        self.visual, self.features = kwargs["visual_pos_masks"], list(features)
        return args, {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}

    def add(self, layer: int, hidden: Tensor, source: Tensor | None) -> Tensor:
        """What enters `layer`: its input [B, L, D] and the features added to the output of the layer before.

        Args:
            hidden: states of the current rows.
            source: [B, L] int64, index of each row in the call's input; None = its own.
        """
        if self.visual is None or not 0 < layer <= len(self.features):
            return hidden
        features = self.features[layer - 1]
        if source is None:
            return self.family.decoder._deepstack_process(hidden, self.visual, features)
        visual, source = self.visual.to(hidden.device), source.to(hidden.device)
        whole = hidden.new_zeros(*visual.shape, hidden.shape[2])
        whole[visual] = features.to(hidden.device, hidden.dtype)
        return hidden + take(whole, source)
