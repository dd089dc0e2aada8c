"""AIM (arXiv 2412.03248, ICCV 2025): merge before the language model, then prune to nothing inside it.

1. Merging: patches are dealt alternately into A and B; every A proposes the B whose key is closest by cosine (whole
   keys of the tower's block after the one that is read; of that one if it is the last); as many as needed, at most all
   of A, are merged by a plain mean; repeated with merged keys until n0 tokens are left. They come as unmerged A, most
   similar first, then B.
2. Pruning: after each of the layers 13 ... 20 (of 32) another eighth of the n0 tokens goes; after layer 20 none is
   left. Importance of a token: M = softmax(logits / 0.1) per head; a uniform vector over all tokens is multiplied by M
   five times; the root of the mean square over heads. Text always stays. Position ids are those of the merged prompt.
   In the released code a dropped token is only masked as a key: it has its share of the uniform vector in later layers,
   too, hands that on in the first step, and so has a say in the ranking (`start="all"`, the default). It has to be
   computed up to layer 20 for that, although nothing else depends on it: up to there the method then costs what it
   would cost to drop nothing, and only holds less in the cache. The paper is silent; `start="kept"` spares that.

The budget is the mean over the layers, as for every method; it determines n0 (32 layers: 373, 249, 125 for 192, 128,
64); `merge_to` gives it directly (per picture; the authors' 252 and 72). A budget above what is left without merging
(297 of 576) cannot be expressed. Layers scale with the depth of the model.

Source: the paper and the authors' image code (LaVi-Lab/AIM, edc24e9, other_packages/LLaVA-PruMerge; Apache-2.0).
Deviations, none with an effect on what is kept: dropped tokens are gone from the sequence and the cache; importance is
computed in the pruning layers only, where it needs all rows of the attention, and in at least float32 (theirs is
float32). Where theirs has no case: in a second turn importance flows among the turn's own tokens; pictures of a prompt,
and frames, share n0 and merge within themselves; prompts of a batch may differ in length; ties go by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import Schedule, check_budget, check_layers, in_tokens
from sparsevlm.core.merging import match, merge_mean, most_removable, survivors
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._dropped import Dropped
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.methods.base import one_of
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.vision import Pictures, Reduced, Tower, Vision, share

_FIRST, _LAST, _DEPTH = 13, 20, 32


@dataclass(frozen=True)
class AIM(VisionMethod):
    """Merging and pruning.

    Attributes:
        merge_to: tokens per picture after merging, instead of a budget.
        first, last: 0-based layers after which pruning starts and ends; None = 13 and 20 of 32, scaled.
        prune: False = only merge; the budget is then the number of merged tokens.
        steps: multiplications by M.
        temperature: of its softmax.
        start: "all" = tokens dropped at an earlier layer have their share of the uniform vector, as in the authors'
            code, and are computed on for that; "kept" = only tokens that are left, nothing is computed for others.
    """

    merge_to: int | None = None
    first: int | None = None
    last: int | None = None
    prune: bool = True
    steps: int = 5
    temperature: float = 0.1
    start: str = "all"

    name: ClassVar[str] = "aim"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.start, ("all", "kept"), "start")
        if self.merge_to is not None and self.budget is not None:
            raise ValueError("budget and merge_to exclude each other. Use one of them")
        if self.merge_to is not None and self.merge_to < 1:
            raise ValueError(f"merge_to {self.merge_to} must be at least 1")
        if self.steps < 0 or self.temperature <= 0:
            raise ValueError(
                f"steps {self.steps} must not be negative, temperature {self.temperature} must be positive"
            )

    @property
    def active(self) -> bool:
        return self.merge_to is not None or super().active

    def check(self, family: Family) -> None:
        super().check(family)
        self._layers(family.n_layers)

    # ---- budgets ---------------------------------------------------------------------------------------------------
    def _layers(self, n_layers: int) -> tuple[int, ...]:
        if not self.prune:
            return ()
        ends = [
            min(int(default * n_layers / _DEPTH + 0.5), n_layers - 2) if given is None else given
            for given, default in ((self.first, _FIRST), (self.last, _LAST))
        ]
        if ends[0] > ends[1]:
            raise ValueError(f"first layer {ends[0]} comes after the last one, {ends[1]}")
        layers = tuple(range(ends[0], ends[1] + 1))
        check_layers(layers, n_layers)
        return layers

    def _schedule(self, merged: int, n_visual: int, n_layers: int) -> Schedule:
        """Return the schedule of a prompt whose visual tokens are merged into `merged`."""
        layers = self._layers(n_layers)
        keep = (merged, *(merged * (len(layers) - i) // len(layers) for i in range(1, len(layers) + 1)))
        none = (0,) * len(keep)
        return Schedule(n_visual, n_layers, (-1, *layers), keep, none, none)

    def _merged(self, budget: int, n_visual: int, n_layers: int) -> int:
        """Return how many tokens to merge into, so that the mean over the layers is nearest to the budget."""
        means = [abs(self._schedule(n, n_visual, n_layers).leaving - budget) for n in range(1, n_visual + 1)]
        most = self._schedule(n_visual, n_visual, n_layers).leaving
        if budget > most + 0.5:
            raise ValueError(
                f"'aim' prunes to nothing in the model: without merging {most:.1f} of {n_visual} tokens per layer are "
                f"left, so budget {budget} is out of reach. Use at most {int(most)}, 'full', or later layers"
            )
        return 1 + means.index(min(means))

    def spend(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        if self.merge_to is not None:
            if sizes and self.merge_to > min(sizes):
                raise ValueError(
                    f"merge_to {self.merge_to} is above the {min(sizes)} visual tokens of a picture (a frame) of this "
                    f"prompt; use at most {min(sizes)}, or a budget, which pictures share"
                )
            return [self.merge_to] * len(sizes)
        budget, total = in_tokens(self.budget, sum(sizes)), sum(sizes)
        return list(sizes) if budget == total else share(self._merged(budget, total, n_layers), sizes)

    def plan_pictures(self, n_visual: int, n_layers: int, size: int) -> Schedule:
        if not self.active or check_budget(self.budget, n_visual) == n_visual:
            return Schedule(n_visual, n_layers, (), (), (), ())
        if self.merge_to is None:
            budget = in_tokens(self.budget, n_visual)
            return self._schedule(self._merged(budget, n_visual, n_layers), n_visual, n_layers)
        return self._schedule(sum(self.spend([size] * max(1, round(n_visual / size)), n_layers)), n_visual, n_layers)

    # ---- merging ---------------------------------------------------------------------------------------------------
    def tower_hooks(self, vision: Vision, tower: Tower) -> list[RemovableHandle]:
        blocks = tower.module.encoder.layers
        block = blocks[min(tower.layer + 1, len(blocks) - 1)]
        return [block.self_attn.k_proj.register_forward_hook(vision.keeper("keys"))]

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        assert pictures.keys is not None  # kept by `tower_hooks`
        cls = int(pictures.tower.cls)
        x, metric = pictures.features[:, cls:], pictures.keys[:, 1:]
        index = torch.arange(cls, cls + x.shape[1], device=x.device).expand(x.shape[0], -1)
        while (now := x.shape[1]) > count:
            r = min(now - count, most_removable(now, False))
            pairs = match(metric, r, protect_first=False, ordered=False)
            x, metric, index = merge_mean(x, pairs), merge_mean(metric, pairs), survivors(index, pairs)
        return Reduced(x, index)

    # ---- pruning ---------------------------------------------------------------------------------------------------
    def positions_after(self, layer: int) -> str:
        return "renumber" if layer < 0 else "original"  # inside the model: those of the merged prompt

    def score(self, stage: Stage) -> Tensor:
        if stage.layer < 0:
            return super().score(stage)
        dropped = self._dropped(stage)
        seen = None if dropped is None else dropped.attention(stage)
        scores = self._importance(stage, dropped, seen).gather(1, stage.visual_index)
        keep = self.keep_counts(stage)
        if self.start == "all" and any(keep):  # else this was the last layer
            new = Dropped.at(stage, rank_by_score(scores, stage.visual_valid), keep)
            attention = new.attention(stage)
            if dropped is not None and seen is not None:
                new, attention = dropped.with_these(new), torch.cat([seen, attention], 2)
            stage.prefill.scratch["dropped"] = new.after(stage, attention)
        return scores

    def keep_all(self, stage: Stage) -> None:
        dropped = self._dropped(stage)
        if dropped is not None:
            stage.prefill.scratch["dropped"] = dropped.after(stage, dropped.attention(stage))

    def _dropped(self, stage: Stage) -> Dropped | None:
        dropped = stage.prefill.scratch.pop("dropped", None)
        return None if dropped is None else dropped.to(stage.hidden.device)

    def _importance(self, stage: Stage, dropped: Dropped | None, seen: Tensor | None) -> Tensor:
        """Compute the importance [B, L] of all rows; `seen`: attention of the dropped ones."""
        length = stage.hidden.shape[1]
        flow = self._flow(stage.attention(length), length)
        start = _prompt(stage.prefill, length).to(flow.dtype).expand(flow.shape[0], -1)
        total = start.sum(1, keepdim=True)
        inflow: Tensor | int = 0
        # nothing flows back to them: they count in the first step only
        if dropped is not None and seen is not None and self.steps:
            asked = dropped.valid.to(flow.dtype)
            total = total + asked.sum(1, keepdim=True)
            inflow = (asked / total)[:, None, None].expand(-1, flow.shape[1], -1, -1) @ self._flow(seen, length)
        importance = (start / total)[:, None, None].expand(-1, flow.shape[1], -1, -1)
        for step in range(self.steps):
            importance = importance @ flow + (inflow if step == 0 else 0)
        return importance[:, :, 0].square().mean(1).sqrt()

    def _flow(self, attention: Tensor, length: int) -> Tensor:
        """Sharpen the attention to the last `length` keys, which are this turn's."""
        return (attention[..., -length:].log() / self.temperature).softmax(-1)


def _prompt(prefill: Prefill, length: int) -> Tensor:
    """Return which rows [B or 1, L] are tokens of the prompt: no padding, nothing generated without a cache."""
    mask = prefill.key_mask
    real = torch.ones(1, length, dtype=torch.bool, device=prefill.device) if mask is None else mask[:, -length:]
    if prefill.text_valid is None:
        return real
    text = nn.functional.pad(prefill.text_valid, (length - prefill.tail, 0))
    ahead = text | prefill.visual_flag
    return real & (ahead.flip(1).cumsum(1).flip(1) > 0)
