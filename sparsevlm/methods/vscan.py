"""VScan (arXiv 2505.22654, TMLR 2026): CLS attention of two depths before the language model, the question inside it.

1. T1 patches. Half of them, h, by the CLS attention (mean over heads) of block 5 of 24: in each of 16 windows of 6 x 6
   patches the best h / 16. The others by the attention of the layer that the language model reads, of what is left.
2. All patches are projected. Each that was not chosen joins the chosen one of highest cosine; a row is the plain mean
   of those that joined and the chosen one. Rows come in the order of the chosen patches.
3. At layer 16 of 32 the T2 visual tokens stay that the prompt's last token attends to most: with that layer's own norm,
   queries and keys on the states that enter it, softmax over all keys, mean over heads. Positions are renumbered, also
   of generated tokens in the layers from there on.

The authors' scripts have T1 = 96 and T2 = 32 for a budget of 64: 1.5 and 0.5 times, half the depth each, so that the
budget is the mean of what enters the layers (`match="entering"`). `match="leaving"`, the default, means the same by a
budget as all methods here and makes T1 = 99, T2 = 33.

Source: the authors' repository (Tencent/SelfEvolvingAgent, a82450e, VScan/; MIT). A window's share is h // 16 there,
and what is left over is lost: T1 = 87 gives 76 tokens. Here the second half gets it.

Deviations: that one; other grids than 24 x 24, which their code asserts, are cut into 16 windows as even as possible;
the block is round(5 / 24 * depth) and the layer half the depth of other models; T1 is at most all patches, and T2 then
meets the budget; a prompt without text after its last picture skips point 3; several pictures of a prompt share T1 and
are ranked together in point 3; a frame's own CLS token, where the model takes it, is dropped first; attention is
float32 in half precision; ties go by index; in a second turn scores use the position ids of layer 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import Schedule, check_layers, in_tokens
from sparsevlm.core.packing import pack, take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.methods.base import int_tuple, one_of
from sparsevlm.methods.bases import MATCHES
from sparsevlm.methods.fastv import last_token_scores, rate_by_last_token
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.vision import Pictures, Reduced, Tower, Vision, cls_row, share

WINDOWS = 4  # per side


@dataclass(frozen=True)
class VScan(VisionMethod):
    """Two-stage selection.

    Attributes:
        keep: T1 and T2 of a prompt, instead of a budget.
        layer: 0-based layer that sees T2 tokens first; None = 16 of 32, scaled.
        match: which mean equals the budget, of the tokens that are "leaving" the layers or "entering" them.
    """

    keep: Sequence[int] | None = None
    layer: int | None = None
    match: str = "leaving"

    name: ClassVar[str] = "vscan"
    captures: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    scores_next: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.match, MATCHES, "match")
        self._set("keep", int_tuple(self.keep, "keep"))
        if self.keep is None:
            return
        if self.budget is not None:
            raise ValueError("budget and keep exclude each other. Use one of them")
        if len(self.keep) != 2 or not 1 <= self.keep[1] <= self.keep[0]:
            raise ValueError(f"keep {self.keep} must be two numbers of tokens, the second at most the first")

    @property
    def active(self) -> bool:
        return self.keep is not None or super().active

    def check(self, family: Family) -> None:
        super().check(family)
        check_layers((self._layer(family.n_layers) - 1,), family.n_layers)

    # ---- budgets ---------------------------------------------------------------------------------------------------
    def _layer(self, n_layers: int) -> int:
        return n_layers // 2 if self.layer is None else self.layer

    def _stages(self, n_visual: int, n_layers: int) -> tuple[int, int]:
        """Return T1 and T2 of a prompt."""
        if self.keep is not None:
            return in_tokens(self.keep[0], n_visual), self.keep[1]
        return stages(in_tokens(self.budget, n_visual), n_visual, self._layer(n_layers), n_layers, self.match)

    def spend(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        return share(self._stages(sum(sizes), n_layers)[0], sizes)

    def plan_pictures(self, n_visual: int, n_layers: int, size: int) -> Schedule:
        if not self.active or self.budget == n_visual:
            return Schedule(n_visual, n_layers, (), (), (), ())
        keep = self._stages(n_visual, n_layers)
        return Schedule(n_visual, n_layers, (-1, self._layer(n_layers) - 1), keep, (0, 0), (0, 0))

    # ---- before the language model ---------------------------------------------------------------------------------
    def tower_hooks(self, vision: Vision, tower: Tower) -> list[RemovableHandle]:
        block = tower.module.encoder.layers[shallow(tower)].self_attn
        watched = {"shallow_queries": block.q_proj, "shallow_keys": block.k_proj}
        return [module.register_forward_hook(vision.keeper(name)) for name, module in watched.items()]

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        cls, more = int(pictures.tower.cls), pictures.more
        block = pictures.tower.module.encoder.layers[shallow(pictures.tower)].self_attn
        local = cls_row(block, more["shallow_queries"], more["shallow_keys"])[..., 1:].mean(1)
        deep = pictures.cls_attention().mean(1)
        chosen = choose(local, deep, pictures.tower.grid, count)
        rows = merge(pictures.features[:, cls:], chosen)
        scores = F.pad(deep, (1, 0), value=float("-inf")) if cls else deep
        return Reduced(rows, chosen + cls, scores)

    # ---- inside it -------------------------------------------------------------------------------------------------
    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        super().begin(prefill, embeddings)
        if prefill.tail:
            rate_by_last_token(prefill, embeddings)

    def keep_counts(self, stage: Stage) -> list[int]:
        keep, asked = super().keep_counts(stage), stage.prefill.prompt.text.any(1)
        return [k if stage.layer < 0 or a else n for k, a, n in zip(keep, asked, stage.n_visual, strict=True)]

    def score(self, stage: Stage) -> Tensor:
        return super().score(stage) if stage.layer < 0 else last_token_scores(stage)


def shallow(tower: Tower) -> int:
    """Return the block whose attention chooses in windows: 5 of 24."""
    return int(5 * len(tower.module.encoder.layers) / 24 + 0.5)


@lru_cache(maxsize=4096)
def stages(budget: int, n_visual: int, layer: int, n_layers: int, match: str) -> tuple[int, int]:
    """Return T1, and T2 from `layer` on: nearest to 3 : 1 so that the mean `match` is the budget."""
    before = layer - (match == "leaving")
    after = n_layers - before
    unit = budget * n_layers / (1.5 * before + 0.5 * after)
    first = min(int(1.5 * unit + 0.5), n_visual)
    second = int((budget * n_layers - before * first) / after + 0.5)
    return first, min(max(second, 1), first)


def choose(local: Tensor, deep: Tensor, grid: int, count: int, remainder: bool = True) -> Tensor:
    """Choose patches by the attention of a shallow block in windows, then by that of a deep one.

    Args:
        local, deep: [n, grid * grid] attention.
        count: patches to choose.
        remainder: give what does not divide among the windows to the second half, else lose it, as the authors do.

    Returns:
        [n, T] int64, ascending.
    """
    edges = [i * grid // WINDOWS for i in range(WINDOWS + 1)]
    each, index = count // 2 // WINDOWS**2, torch.arange(grid * grid, device=local.device).view(grid, grid)
    taken = torch.zeros_like(local, dtype=torch.bool)
    for top, bottom in zip(edges, edges[1:], strict=False):
        for left, right in zip(edges, edges[1:], strict=False):
            window = index[top:bottom, left:right].flatten()
            best = rank_by_score(local[:, window])[:, :each]
            taken = taken.scatter(1, window[best], 1)
    total = count if remainder else each * WINDOWS**2 + count - count // 2
    order = rank_by_score(deep.masked_fill(taken, float("-inf")))[:, : total - each * WINDOWS**2]
    return pack(taken.scatter(1, order, 1), total)


def merge(x: Tensor, chosen: Tensor) -> Tensor:
    """Merge tokens [n, N, D] into those `chosen` [n, T]: each other one joins the most similar, by a plain mean."""
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    group = (unit @ take(unit, chosen).mT).argmax(2)
    own = torch.arange(chosen.shape[1], device=x.device).expand_as(chosen)
    group = group.scatter(1, chosen, own)
    member = (group[:, None] == own[:, :, None]).to(unit.dtype)
    return (member @ x.to(unit.dtype) / member.sum(2, keepdim=True)).to(x.dtype)
