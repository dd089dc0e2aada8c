"""ATP-LLaVA (arXiv 2412.00447, CVPR 2025), after a third party's reading: thresholds that are learnt per stage.

The authors have published no code and their equations could not be obtained. What follows is what a student team's port
(Sneha421/AI6103-ATP-LLaVA c9a622f, llava/model/atp_module.py) makes of the paper, and notes of readers agree with.
Every result of it is one "after a third party's reading".

1. After layers 4, 14 and 24 of 32 (scaled to the model's depth) every visual token that is left gets
   S_self: the attention that the visual tokens pay it, S_cross: the attention that the text behind the picture pays it,
   means over heads and rows of that layer; S_red = (S_self + S_cross) / 2;
   S_spat: 1 - 3R if it is in a uniform sample of the share R of its picture's rows and columns, else 0.
2. A small module predicts two thresholds from the levels of S_self and S_cross. A token stays if S_red > theta_r or
   S_spat > theta_s; at least one stays. Position ids are the original ones.

How many stay depends on the picture and the question: there is no budget. `shift` is added to all thresholds to reach
another mean (`python -m sparsevlm.mini.training.shift` solves it); read the mean reached from the trace.

`variant="normalised"` (the default): S_self and S_cross are divided by their means over the tokens that are left, the
levels are the shares of attention that go to visual tokens, theta_r is a softplus. `variant="port"`: as the port has
it. There S_self is the mean of the logits that a token pays, of order 1, and S_cross a mean of probabilities, of order
1/V, so that text has no influence; all thresholds are sigmoids, the levels the means of the scores.

Deviations from the port, in both variants: a token keeps its place in the picture's grid after earlier stages (the
port's places are those of the shortened sequence); videos and other grids are sampled per picture; tokens that are no
square grid are sampled as a line; padding counts nowhere; and at least one token stays.

Weights: `modules` is a file that `python -m sparsevlm.mini.training.modules atp_llava` writes, None = the one shipped
for `mini`, "untrained" = random weights drawn from `seed`, "fixed" = one threshold of softplus(0) = .69 for S_red at
all stages and no sample. The last two are controls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from sparsevlm.budget import Schedule, scale_layers
from sparsevlm.core.thresholds import excess, received, relative, spatial_scores, stride_of
from sparsevlm.methods._grid import uniform_sample
from sparsevlm.methods._threshold_files import Stages, find
from sparsevlm.methods.base import one_of
from sparsevlm.methods.bases import PruneInStages
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage

VARIANTS = ("normalised", "port")
IMPORTANCE = ("both", "self", "cross")
_LAYERS = (4, 14, 24)  # of 32


@dataclass(frozen=True)
class ATPLLaVA(PruneInStages):
    """ATP-LLaVA after a third party's reading.

    Attributes:
        layers: 0-based layers after which tokens go; None = those of the modules.
        variant: "normalised", or "port" = the port's arithmetic.
        modules: file of the weights, "untrained", "fixed", or None = the one shipped for `mini`.
        seed: of untrained modules.
        shift: added to all thresholds.
        sampling: share R of the uniform sample.
        spatial: False = without the sample.
        importance: "both", or only "self" or "cross".
    """

    variant: str = "normalised"
    modules: str | None = None
    seed: int = 0
    shift: float = 0.0
    sampling: float = 0.0625
    spatial: bool = True
    importance: str = "both"

    name: ClassVar[str] = "atp_llava"
    adaptive: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.variant, VARIANTS, "variant")
        one_of(self.importance, IMPORTANCE, "importance")
        if not 0 < self.sampling <= 1:
            raise ValueError(f"sampling {self.sampling} is a share of the tokens. Use a number above 0, at most 1")

    def where(self, n_layers: int) -> tuple[int, ...]:
        return scale_layers(n_layers, _LAYERS) if self.layers is None else tuple(self.layers)

    def attach(self, family: Family) -> Stages:
        return find(self.modules, family, self.where(family.n_layers), self.layers, self.variant, self.seed)

    def schedule(self, n_visual: int, n_layers: int, attached: Stages) -> Schedule:
        return replace(self, layers=attached.layers).plan(n_visual, n_layers)

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        prefill.scratch["sampled"] = uniform_sample(prefill, stride_of(self.sampling))

    def score(self, stage: Stage) -> Tensor:
        prefill = stage.prefill
        device = stage.hidden.device
        index = stage.visual_index
        valid = stage.visual_valid if stage.visual_valid is not None else torch.ones_like(index, dtype=torch.bool)
        above_self, above_cross, level_self, level_cross = self._importance(stage, valid)
        if self.importance != "both":
            above_self = above_cross = above_self if self.importance == "self" else above_cross
        thresholds = prefill.attached.of(stage.layer, device)
        theta_r, theta_s = thresholds(level_self.float(), level_cross.float())
        theta_r = theta_r.sigmoid() if self.variant == "port" else softplus(theta_r)
        theta_s = theta_s.sigmoid()
        if not self.spatial or prefill.attached.fixed:
            theta_s = torch.full_like(theta_s, float("inf"))
        source = prefill.source
        rows = index if source is None else source.gather(1, index)
        sampled = prefill.scratch["sampled"].to(device).gather(1, rows)
        spatial = spatial_scores(sampled, self.sampling).to(above_self.dtype)
        above = excess((above_self + above_cross) / 2, spatial, theta_r + self.shift, theta_s + self.shift)
        prefill.scratch["counts"] = ((above > 0) & valid).sum(1).clamp(min=1)
        return above

    def keep_counts(self, stage: Stage) -> list[int]:
        counts = stage.prefill.scratch["counts"].tolist()
        return [min(n, c) for n, c in zip(stage.n_visual, counts, strict=True)]

    def _importance(self, stage: Stage, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return S_self, S_cross [B, V], and the levels [B] of both."""
        prefill, length = stage.prefill, stage.hidden.shape[1]
        attention = stage.visual_columns(stage.attention(length))
        text = torch.ones(len(valid), prefill.tail, dtype=torch.bool, device=attention.device)
        if prefill.text_valid is not None:
            text = prefill.text_valid
        cross = received(attention, pad(text.to(attention.dtype), (length - prefill.tail, 0)))
        if self.variant == "port":
            index = stage.visual_index
            logits = stage.mean_logits().gather(1, index[..., None].expand(-1, -1, length))
            weights = valid.to(logits.dtype)
            count = weights.sum(1).clamp(min=1)
            own = (stage.visual_columns(logits) @ weights[..., None])[..., 0] / count[:, None]
            return own, cross, *((x * weights).sum(1) / count for x in (own, cross))
        rows = torch.zeros(stage.hidden.shape[:2], dtype=attention.dtype, device=attention.device)
        rows = rows.scatter(1, stage.visual_index, valid.to(attention.dtype))
        own, level_self = relative(received(attention, rows), valid)
        cross, level_cross = relative(cross, valid)
        return own, cross, level_self, level_cross
