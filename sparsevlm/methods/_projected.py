"""Base of the methods that choose among projected visual tokens: they need nothing but what the projector makes.

Where a picture is one row of the projector per placeholder (LLaVA-1.5, Video-LLaVA) they act behind the projector, as
all `VisionMethod`s. Elsewhere (tiles with line breaks, merged patches) they act on the same rows once these are among
the input embeddings of the language model, as a stage at layer -1: the method then works on every family, and on plain
text models with `visual_mask=`. Line breaks between rows of tiles are visual tokens like any other.

There, visual tokens that follow each other are one picture: a video, pictures without text between them, or a frame
where text parts frames (Qwen3-VL). Pictures of a prompt share the budget as in `VisionMethod`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.vision import Pictures, Vision


@dataclass(frozen=True)
class ProjectedMethod(VisionMethod):
    """Override `reduce`, which reads `pictures.features` only and returns rows as they are (no origin of -1)."""

    after_projector = True

    def check(self, family: Family) -> None:
        if _has_grid(family):
            super().check(family)

    def attach(self, family: Family) -> Vision | None:
        return super().attach(family) if _has_grid(family) else None

    def score(self, stage: Stage) -> Tensor:
        """Score what was chosen with 1, the rest with 0."""
        if stage.prefill.attached is not None:
            return super().score(stage)
        visual = stage.visual()
        scores = visual.new_zeros(visual.shape[:2], dtype=torch.float32)
        alike: dict[tuple[int, int], list[tuple[int, int]]] = {}  # pictures of one size that keep as many tokens
        for b, sizes in enumerate(stage.prefill.prompt.runs):
            start = 0
            for size, count in zip(sizes, self.spend(sizes, stage.prefill.family.n_layers), strict=True):
                alike.setdefault((size, count), []).append((b, start))
                start += size
        for (size, count), places in alike.items():
            rows = torch.stack([visual[b, start : start + size] for b, start in places])
            for (b, start), chosen in zip(places, self._group(Pictures(None, rows), count).origin, strict=True):
                scores[b, start + chosen] = 1
        return scores


def _has_grid(family: Family) -> bool:
    return family.record is not None and family.record.grid
