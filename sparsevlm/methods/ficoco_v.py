"""FiCoCo-V (arXiv 2411.17686, AAAI 2026): filter, correlate, compress in the later blocks of the vision tower.

In each block from the 12th (0-based) of 24 to the one that is read, between attention and MLP, r patches are discarded
(A = the block's softmaxed attention, mean over heads):
1. Filter: redundancy s_i = lam mean_j A_ij - (1 - lam) A_CLS,i over the patches j; in every 2 x 2 window of the picture
   the largest s is scaled by 2 (a negative one halved), so that its neighbours are spared; the r largest go.
2. Correlate: a discarded i spreads to the remaining j whose A_ij is at least the eps-quantile of its row.
3. Compress: with alpha_ij = A_ij, normalised over these j, x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij).
r is constant up to rounding (LLaVA-1.5, 11 blocks: 35, 40.7, 46.5 for 192, 128, 64), so that exactly T are left.

This is the paper, `variant="paper"`. Where it is silent: rows of A are softmaxed over CLS and patches; the quantile is
that of the remaining patches (linear interpolation: with eps = .998 the best one, or two of more than 500); patches
stay in their order; the start scales with the depth of the tower; ties go by index.

The released code (kawhiiiileo/FiCoCo, 8995e93; no licence, nothing of it was used) computes something else, and since
it is what the authors ran, the published numbers can come from `variant="code"` only; those at 64 tokens cannot (see
below), and what others quote as FiCoCo-V is of an older version. It differs so:
- A is the logits before the softmax; both terms of s are first divided by their L2 norm, and weigh .65 (patches) and
  .35 (CLS): `lam` is CLS's weight there.
- Windows belong to a map of the whole picture that outlives the block: the largest s of each window is entered once,
  its place then stays empty, and later blocks fill what is left in order of their tokens. A place of the map is used as
  the number of a token.
- Survivors are put in order of falling s, CLS last; the next block takes the first token for CLS all the same, and so
  does LLaVA, which drops that patch and may keep CLS.
- Targets are the tokens above the eps-quantile among all, discarded ones included; shares are those of a softmax over
  the logits. The number of a target counts in the old order, where it is too large for the new one less r, and is used
  in the new order.
Deviations of `variant="code"`: the map begins anew with every picture (theirs never does), has as many windows as the
picture (theirs 144), and pictures of a batch are decided one by one (theirs average A over the batch). Budgets: r above
half of a block's tokens fails there, in block 23, which nobody reads, from r = 45 on; here in the blocks that are read
only, where earlier blocks and, unless `start` is given, earlier starts then do what later ones cannot (LLaVA-1.5 at 64
needs neither, `mini` both). Telling the trace whether CLS is among the tokens waits for the device.

Nothing bounds how many patches one patch takes in: its own share is one part in one more than that. In LLaVA-1.5 some
40 patches go per block; where a budget makes a shallow tower merge hundreds per block, dozens end in one patch, and
`merge=False` is far better (results/reference/methods has both on `mini`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.core.merging import merge_schedule
from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._blocks import BlockMethod
from sparsevlm.methods._ficoco import VARIANTS, code_weights
from sparsevlm.methods.base import one_of
from sparsevlm.runtime.blocks import Blocks, Tokens
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Tower, Vision, attention_logits, find_towers


@dataclass(frozen=True)
class FiCoCoV(BlockMethod):
    """Filter, correlate, compress in the vision tower.

    Attributes:
        variant: "paper", or "code" for what the authors' code computes.
        start: 0-based first block; None = half of the tower's blocks (12 of 24).
        lam: weight of the patches' attention against that of CLS (.35); with "code" that of CLS against the patches'.
        eps: quantile of the correlations that count (.998).
        window: side of the windows of the local penalty (2); 1 = no penalty.
        scaling: of the largest redundancy in a window (2).
        merge: False discards without compressing.
    """

    variant: str = "paper"
    start: int | None = None
    lam: float = 0.35
    eps: float = 0.998
    window: int = 2
    scaling: float = 2.0
    merge: bool = True

    name: ClassVar[str] = "ficoco_v"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.variant, VARIANTS, "variant")
        if not 0 <= self.lam <= 1 or not 0 <= self.eps <= 1:
            raise ValueError(f"lam {self.lam} and eps {self.eps} must be between 0 and 1")
        if self.window < 1 or self.scaling < 1:
            raise ValueError(f"window {self.window} and scaling {self.scaling} must be at least 1")

    def check(self, family: Family) -> None:
        for tower in find_towers(family, self.name):
            if self.start is not None and not 0 <= self.start <= tower.layer:
                raise ValueError(f"start {self.start} must be between 0 and {tower.layer}, the last block that is read")

    # ---- how many tokens each block leaves -------------------------------------------------------------------------
    def layers(self, tower: Tower) -> range:
        first: int = tower.module.config.num_hidden_layers // 2 if self.start is None else self.start
        if self.start is None and self.variant == "code":
            first = 0  # where a budget needs that
        return range(min(first, tower.layer), tower.layer + 1)

    def removals(self, tower: Tower, count: int) -> dict[int, int]:
        """Return the patches to discard in each block, so that `count` are left.

        Raises:
            ValueError: variant "code" would have to discard more than half of a block's tokens.
        """
        blocks = self.layers(tower)
        if self.variant == "paper":
            after = [tower.patches, *spread(tower.patches, count, len(blocks))]
            return {i: a - b for i, (a, b) in zip(blocks, pairwise(after), strict=True)}
        if self.start is None:
            needed = math.ceil(math.log2(tower.patches / count))
            half = tower.module.config.num_hidden_layers // 2
            blocks = range(max(0, min(half, tower.layer, tower.layer + 1 - needed)), tower.layer + 1)
        gone = merge_schedule(tower.patches, count, len(blocks))
        if gone[0] > (tower.patches + 1) // 2:
            raise ValueError(
                f"variant='code' of 'ficoco_v' discards at most half of a block's tokens: {len(blocks)} blocks cannot "
                f"bring {tower.patches} down to {count}. Use an earlier start, a larger budget or variant='paper'"
            )
        return dict(zip(blocks, gone, strict=True))

    # ---- one block -------------------------------------------------------------------------------------------------
    def block(self, run: Blocks, i: int, layer: Network, tokens: Tokens) -> None:
        tower = run.tower
        tokens.x = run.attend(layer, tokens)
        drop = self.removals(tower, tokens.count).get(i, 0)
        if drop:
            assert tokens.queries is not None and tokens.keys is not None  # `attend` has kept them
            logits = attention_logits(layer.self_attn, tokens.queries, tokens.keys)
            if self.variant == "paper":
                self._as_in_the_paper(tokens, logits.softmax(-1).mean(1), drop, tower)
            else:
                self._as_in_the_code(tokens, logits.mean(1), drop, tower)
        tokens.x = run.mlp(layer, tokens.x)

    def _as_in_the_paper(self, tokens: Tokens, attention: Tensor, drop: int, tower: Tower) -> None:
        redundancy = self.redundancy(attention, tokens.index[:, 1:] - 1, tower.grid)
        order = rank_by_score(redundancy)
        gone, stay = order[:, :drop] + 1, order[:, drop:].sort(1).values + 1
        x = tokens.x
        kept = compress(x, attention, gone, stay, self.eps) if self.merge else take(x, stay)
        tokens.x = torch.cat([x[:, :1], kept], 1)
        tokens.index = torch.cat([tokens.index[:, :1], tokens.index.gather(1, stay)], 1)

    def _as_in_the_code(self, tokens: Tokens, logits: Tensor, drop: int, tower: Tower) -> None:
        cls, patches = logits[:, 0, 1:], logits[:, 1:, 1:].mean(2)
        score = (1 - self.lam) * F.normalize(patches, dim=1) - self.lam * F.normalize(cls, dim=1)
        score = self._penalised(score, tokens.scratch, tower.grid)
        order = rank_by_score(F.pad(score, (1, 0), value=float("-inf")))  # what is first is never discarded
        gone, stay = order[:, :drop], order[:, drop:]
        x = take(tokens.x, stay)
        if self.merge:
            weights = code_weights(take(logits, gone), self.eps, [logits.shape[2]] * len(logits))
            new = weights[..., : stay.shape[1]].clone()  # the number of a target, used for the new order
            new[..., stay.shape[1] - drop :] += weights[..., stay.shape[1] :]
            wide = x.to(weights.dtype) + new.transpose(1, 2) @ take(tokens.x, gone).to(weights.dtype)
            x = (wide / (1 + new.sum(1)[..., None])).to(x.dtype)
        tokens.x, tokens.index = x, tokens.index.gather(1, stay)

    def _penalised(self, score: Tensor, scratch: dict[str, Tensor], grid: int) -> Tensor:
        """Apply the code's local penalty to scores [n, t]; `scratch` carries its map [n, patches] on."""
        if self.window == 1:
            return score
        empty = float("-inf")
        n, t = score.shape
        full = scratch.get("map")
        if full is None:
            full = score.new_zeros(n, grid**2)
        there = full != empty
        token = there.cumsum(1) - 1
        full = torch.where(there & (token < t), score.gather(1, token.clamp(0, t - 1)), full)
        side = grid // self.window
        inside = side * self.window
        windows = full.view(n, grid, grid)[:, :inside, :inside].unflatten(2, (side, -1)).unflatten(1, (side, -1))
        best = windows.transpose(2, 3).flatten(3).argmax(3, keepdim=True)  # of equals the first
        row = torch.arange(side, device=best.device)[:, None, None] * self.window + best // self.window
        column = torch.arange(side, device=best.device)[:, None] * self.window + best % self.window
        chosen = (row * grid + column).flatten(1)
        chosen = torch.zeros_like(there).scatter(1, chosen, torch.ones_like(chosen, dtype=there.dtype))
        chosen = chosen & (torch.arange(grid**2, device=best.device) < t)
        scratch["map"] = full.masked_fill(chosen, empty)
        scaled = torch.where(score < 0, score / self.scaling, score * self.scaling)
        return torch.where(chosen[:, :t], scaled, score)

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        made = super().encode(vision, pictures, encoding)
        if self.variant == "code":
            for reduced in (r for r in made if not r.origin.is_meta):  # else there are sizes only, as in counts
                reduced.extra = (reduced.origin < 0).sum(1).tolist()
        return made

    def redundancy(self, attention: Tensor, places: Tensor, grid: int) -> Tensor:
        """Compute the redundancy [n, t] of patches at `places` [n, t] from attention [n, 1 + t, 1 + t]; high goes."""
        score = self.lam * attention[:, 1:, 1:].mean(2) - (1 - self.lam) * attention[:, 0, 1:]
        if self.window == 1:
            return score
        per_row = -(-grid // self.window)
        window = places // grid // self.window * per_row + places % grid // self.window
        top = score.new_full((score.shape[0], per_row**2), float("-inf"))
        top = top.scatter_reduce(1, window, score, "amax").gather(1, window)
        scaled = torch.where(score > 0, score * self.scaling, score / self.scaling)
        return torch.where(score == top, scaled, score)


def spread(tokens: int, left: int, blocks: int) -> list[int]:
    """Return the tokens after each of `blocks` blocks that remove the same number each, up to rounding."""
    return [tokens - ((tokens - left) * (i + 1) * 2 + blocks) // (2 * blocks) for i in range(blocks - 1)] + [left]


def compress(x: Tensor, attention: Tensor, gone: Tensor, stay: Tensor, eps: float) -> Tensor:
    """Spread the tokens `gone` [n, g] of x [n, t, d] over those that `stay` [n, s]; returns these [n, s, d]."""
    rows = take(attention, gone).gather(2, stay[:, None].expand(-1, gone.shape[1], -1))
    targets = int((1 - eps) * (rows.shape[2] - 1) + 1e-9) + 1  # as many are at or above the eps-quantile
    value, place = rows.topk(targets, dim=2)
    alpha = torch.zeros_like(rows).scatter(2, place, value / value.sum(2, keepdim=True).clamp(min=1e-30))
    wide = x.to(alpha.dtype)
    kept = take(wide, stay) + alpha.transpose(1, 2) @ take(wide, gone)
    return (kept / (1 + alpha.sum(1)[..., None])).to(x.dtype)
