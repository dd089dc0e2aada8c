"""FiCoCo-L: filter, correlate, compress in the language model (Han et al., AAAI 2026, https://arxiv.org/abs/2411.17686).

On the output of every layer from `start` on (but the last), `r` visual tokens are folded into the others. With A the
layer's attention averaged over its heads, i and j visual tokens, k text tokens after the image:

1. Filter: redundancy s_i = beta * mean_j A_ij - (1 - beta) * mean_k A_ki; the r largest are discarded.
2. Correlate: C_ij = gamma * A_ij + (1 - gamma) * sum_k A_ki A_kj; a discarded i goes to all kept j whose C_ij is at
   least the epsilon-quantile of its row.
3. Compress: alpha_ij = C_ij / sum_j C_ij over these, and x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij).

This is the paper, `variant="paper"`, with its constants. Where it is silent or cannot hold in a causal model:
- A visual token comes before the text, so its attention to it, A_ik, is zero. The attention that it *receives* from the
  text stands in the second terms of (1) and (2). A_ij is the model's own: zero for j behind i.
- The paper's "4th layer" is index 4 of 32, as its "12th" of FiCoCo-V is index 12 in the code (which has 5 here).
- Attention is that of the layer, states are its output: the reduction stands between two layers.
- A budget solves for r, which then is no whole number: after i layers r * i tokens, rounded, are gone, at least one
  stays. `start` moves to earlier layers where those before it would take up more than 0.8 of the budget; with start=4
  the floor is 72.9 of 576 tokens, so the paper's smallest setting needs that.
- Position ids are renumbered, as in the released code.

The released code (kawhiiiileo/FiCoCo, 8995e93; no licence, nothing of it was used) does not run: two of its modules are
missing and one does not parse. Without these obstacles it computes what `variant="code"` does, which is as near to the
published numbers as one can come; those at about 64 tokens are out of reach of its first layer. It differs so:
- It reduces within a layer, between attention and MLP, from layer 5 of 32 on.
- A is the logits before mask and softmax; A_ij is summed over j; the text's part is A_ik of (1), the mean over the text
  behind the picture, and sum_k A_ik A_kj of (2). The first visual token is never discarded.
- Targets are the tokens above the epsilon-quantile among all others, discarded ones included, whose share is lost;
  shares are those of a softmax; x_j <- x_j + sum_i alpha_ij x_i, without division.
Deviations of `variant="code"`: the picture is where it is (theirs is taken to be tokens 0 ... 575); nothing is
discarded in the last layer, where it would change no answer; with r given the reduction ends where no more than r
visual tokens are left (so does theirs if the whole prompt is no longer than r, else it fails); a generated token takes
the position behind the last one (theirs one that is r lower); a budget is solved for as above; prompts of a batch and
second turns are treated each by itself.

The paper's variant makes the attention among visual tokens whole at each of these layers (heads x L x L in float32; 0.6
GB for a video of 2,056 tokens on a 7B model): that is the method, which therefore saves less than its token count
promises. `variant="code"` needs only the mean of the logits over the heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import (
    Schedule,
    check_layers,
    explicit_schedule,
    nearest,
    scale_layers,
    start_earlier,
)
from sparsevlm.core.packing import take
from sparsevlm.core.raters import select_raters
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._ficoco import VARIANTS, code_weights
from sparsevlm.methods.base import one_of
from sparsevlm.methods.bases import PlannedMethod
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage

_START = {"paper": 4, "code": 5}  # of 32


@dataclass(frozen=True)
class FiCoCoL(PlannedMethod):
    """FiCoCo-L.

    Attributes:
        variant: "paper", or "code" for what the authors' code computes.
        start: first layer (0-based) on whose output tokens are reduced. None = 4 of 32 ("code": 5), scaled to the
            model's depth.
        r: visual tokens discarded per layer, instead of a budget.
        beta, gamma, epsilon: the paper's constants.
        positions: "renumber" (the authors' code) or "original".
    """

    variant: str = "paper"
    start: int | None = None
    r: float | None = None
    beta: float = 0.6
    gamma: float = 0.6
    epsilon: float = 0.998
    positions: str = "renumber"

    name: ClassVar[str] = "ficoco_l"
    instead: ClassVar[str] = "r"
    needs_text: ClassVar[bool] = True
    early_drop = False  # the output of discarded tokens is needed

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.variant, VARIANTS, "variant")
        one_of(self.positions, ("renumber", "original"), "positions")
        for option in ("beta", "gamma", "epsilon"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} {getattr(self, option)} is a share between 0 and 1")
        if self.r is not None and self.r < 0:
            raise ValueError(f"r {self.r} is a number of tokens to discard per layer, at least 0")

    def check(self, family: Family) -> None:
        if self.start is not None:
            check_layers((self.start,), family.n_layers)

    def plan_counts(self, n_visual: int, n_layers: int) -> Schedule:
        assert self.r is not None  # else there is a budget
        start = self._first(n_layers) if self.start is None else self.start
        return _constant(n_visual, n_layers, start, self.r, ends=self.variant == "code")

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        return _solve(budget, n_visual, n_layers, self.start, self._first(n_layers))

    def _first(self, n_layers: int) -> int:
        """Return the published first layer, scaled to the model's depth."""
        return scale_layers(n_layers, (_START[self.variant],))[0]

    def attach(self, family: Family) -> _Additions | None:
        return _Additions(family) if self.variant == "code" else None

    def hooks(self, attached: _Additions | None) -> list[RemovableHandle]:
        return [] if attached is None else attached.handles()

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        if prefill.attached is not None:
            prefill.attached.due.clear()
        text = embeddings[:, embeddings.shape[1] - prefill.tail :]
        prefill.set_raters(select_raters(text, text, None, prefill.text_valid, "all"))

    def score(self, stage: Stage) -> Tensor:
        return self._paper_score(stage) if self.variant == "paper" else self._code_score(stage)

    def _paper_score(self, stage: Stage) -> Tensor:
        prefill = stage.prefill
        keep = self.keep_counts(stage)
        rows = stage.attention(stage.hidden.shape[1]).mean(1)  # [B, L, S]
        visual = stage.visual_columns(take(rows, stage.visual_index))  # A_ij [B, V, V]
        text = stage.visual_columns(rows[:, rows.shape[1] - prefill.tail :])  # A_kj [B, T, V]
        assert prefill.weights is not None  # set in `begin`
        weights = prefill.weights.to(rows.dtype)
        text_mean = (weights[:, None] @ text)[:, 0]
        if stage.visual_valid is not None:
            visual = visual.masked_fill(~stage.visual_valid[:, None], 0)
        count = torch.tensor(stage.n_visual, device=rows.device).clamp(min=1)[:, None]
        redundancy = self.beta * visual.sum(-1) / count - (1 - self.beta) * text_mean
        text = text * (weights > 0)[..., None]
        correlation = self.gamma * visual + (1 - self.gamma) * text.transpose(1, 2) @ text
        kept = _best(-redundancy, stage.visual_valid, keep)
        discarded = ~kept if stage.visual_valid is None else ~kept & stage.visual_valid
        folded = fold_weights(correlation, kept, discarded, keep, self.epsilon)
        prefill.scratch["fold"] = stage.visual_index, folded
        return -redundancy

    def _code_score(self, stage: Stage) -> Tensor:
        prefill, valid = stage.prefill, stage.visual_valid
        logits = stage.mean_logits()
        text = logits.shape[1] - prefill.tail
        rows = take(logits, stage.visual_index)
        visual = stage.visual_columns(rows)  # A_ij [B, V, V]
        assert prefill.weights is not None  # set in `begin`
        weights = prefill.weights.to(rows.dtype)[:, None]
        to_text = rows[..., text:]  # A_ik [B, V, T]
        from_text = stage.visual_columns(logits[:, text:])  # A_kj [B, T, V]
        summed = visual if valid is None else visual.masked_fill(~valid[:, None], 0)
        redundancy = self.beta * summed.sum(-1) - (1 - self.beta) * (to_text * weights).sum(-1)
        redundancy[:, 0] = float("-inf")
        correlation = self.gamma * visual + (1 - self.gamma) * (to_text * (weights > 0)) @ from_text
        itself = torch.eye(correlation.shape[1], dtype=torch.bool, device=logits.device)
        none = itself if valid is None else itself | ~valid[:, None]
        kept = _best(-redundancy, valid, self.keep_counts(stage))
        discarded = ~kept if valid is None else ~kept & valid
        shares = code_weights(correlation.masked_fill(none, float("-inf")), self.epsilon, stage.n_visual)
        prefill.attached.due[stage.layer] = stage.visual_index, torch.where(discarded[..., None], shares, 0)
        return -redundancy

    def before_drop(self, prefill: Prefill, layer: int, hidden: Tensor) -> Tensor:
        """Fold the discarded tokens into the kept ones."""
        if self.variant == "code":
            return hidden  # it was done within the layer
        with part("recycling"):
            index, weights = (t.to(hidden.device) for t in prefill.scratch.pop("fold"))
            tokens = take(hidden, index)
            mixed = (tokens + weights.mT @ tokens.to(weights.dtype)) / (1 + weights.sum(1))[..., None]
            return hidden.scatter(1, index[..., None].expand_as(tokens), mixed.to(hidden.dtype))


class _Additions:
    """Hooks that add shares of some tokens to others between attention and MLP of a layer.

    Attributes:
        due: by layer, [B, V] int64 rows of tokens, and [B, V, V] the share of each that every one of them gets.
    """

    def __init__(self, family: Family):
        self.family = family
        self.due: dict[int, tuple[Tensor, Tensor]] = {}

    def handles(self) -> list[RemovableHandle]:
        norms = (layer.post_attention_layernorm for layer in self.family.decoder.layers)
        return [norm.register_forward_pre_hook(partial(self._add, i)) for i, norm in enumerate(norms)]

    def _add(self, i: int, norm: nn.Module, args: tuple[Tensor]) -> None:
        """Change the input of the MLP's norm in place, because it is the residual, too."""
        if i in self.due:
            with part("recycling"):
                index, weights = (t.to(args[0].device) for t in self.due.pop(i))
                tokens = take(args[0], index)
                tokens = (tokens + weights.mT @ tokens.to(weights.dtype)).to(tokens.dtype)
                args[0].scatter_(1, index[..., None].expand_as(tokens), tokens)


def fold_weights(correlation: Tensor, kept: Tensor, discarded: Tensor, keep: list[int], epsilon: float) -> Tensor:
    """Compute alpha: how much of each discarded token each kept one takes up.

    Args:
        correlation: [B, V, V], of the row's token with the column's; not negative.
        kept, discarded: [B, V] bool.
        keep: number of kept tokens per sample, known to the host.
        epsilon: quantile of a row's correlations with kept tokens from which on these are targets.

    Returns:
        [B, V, V]: rows of discarded tokens sum to one over kept columns (to zero if all correlations are zero).
    """
    among = correlation.masked_fill(~kept[:, None], float("-inf"))
    # the values not below the quantile between two of them are those not below the upper one
    ranks = [max(n - 1 - math.ceil(epsilon * (n - 1)), 0) for n in keep]
    rank = torch.tensor(ranks, device=correlation.device)[:, None, None].expand(-1, correlation.shape[1], 1)
    threshold = among.sort(dim=-1, descending=True).values.gather(-1, rank)
    chosen = (among >= threshold) & kept[:, None] & discarded[..., None]
    alpha = correlation * chosen
    return alpha / alpha.sum(-1, keepdim=True).clamp(min=torch.finfo(alpha.dtype).tiny)


def _best(score: Tensor, valid: Tensor | None, keep: list[int]) -> Tensor:
    """Mark the `keep` highest scores of each sample: [B, V] bool."""
    order = rank_by_score(score, valid)
    column = torch.arange(score.shape[1], device=score.device)
    inside = column < torch.tensor(keep, device=score.device)[:, None]
    return torch.zeros_like(inside).scatter(1, order, inside)


def _constant(n_visual: int, n_layers: int, start: int, r: float, ends: bool = False) -> Schedule:
    """Return the schedule with r tokens fewer after each layer from `start` on, the sum rounded, until one is left.

    Layers without a change are left out. `ends`: stop where no more than r tokens are left.
    """
    layers, keep, count = [], [], n_visual
    for layer in range(start, n_layers - 1):
        left = n_visual - int(r * (layer - start + 1) + 0.5)
        if ends and left < 1:
            break
        left = max(1, left)
        if left < count:
            layers.append(layer)
            keep.append(left)
            count = left
    return explicit_schedule(n_visual, n_layers, tuple(layers), tuple(keep))


@lru_cache(maxsize=4096)
def _solve(budget: int, n_visual: int, n_layers: int, start: int | None, first: int) -> Schedule:
    if start is None:
        start = start_earlier(first, budget, n_visual, n_layers)
    check_layers((start,), n_layers)

    def schedule(share: float) -> Schedule:
        return _constant(n_visual, n_layers, start, (n_visual - 1) * (1 - share))

    floor = schedule(0.0).leaving
    if budget < floor:
        raise ValueError(
            f"budget {budget} is out of reach of FiCoCo-L from layer {start} on: the layers before it see all "
            f"{n_visual} visual tokens, so the mean is at least {floor:.1f}. Use a smaller start"
        )
    return nearest(schedule, lambda s: s.leaving, budget)
