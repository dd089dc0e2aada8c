"""FiCoCo-V (arXiv 2411.17686, AAAI 2026): filter, correlate, compress in the later blocks of the vision tower.

In each block from the 12th (0-based) of 24 to the one that is read, between attention and MLP, r patches are discarded
(A = the block's softmaxed attention, mean over heads):
1. Filter: redundancy s_i = lam mean_j A_ij - (1 - lam) A_CLS,i over the patches j; in every 2 x 2 window of the picture
   the largest s is scaled by 2 (a negative one halved), so that its neighbours are spared; the r largest go.
2. Correlate: a discarded i spreads to the remaining j whose A_ij is at least the eps-quantile of its row.
3. Compress: with alpha_ij = A_ij, normalised over these j, x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij).
r is constant up to rounding (LLaVA-1.5, 11 blocks: 35, 40.7, 46.5 for 192, 128, 64), so that exactly T are left.

This is the paper. The released code differs: it uses logits instead of softmaxed attention and averages them over the
batch, puts CLS last while the next block and LLaVA take the first token for CLS, loses merge targets in re-ordering,
and never resets its window map. Where the paper is silent: rows of A are softmaxed over CLS and patches; the quantile
is that of the remaining patches (linear interpolation: with eps = .998 the best one, or two of more than 500); patches
stay in their order; the start scales with the depth of the tower; ties go by index.

Nothing bounds how many patches one patch takes in: its own share is one part in one more than that. In LLaVA-1.5 some
40 patches go per block; where a budget makes a shallow tower merge hundreds per block, dozens end in one patch, and
`merge=False` is far better (results/reference/methods has both on `mini`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsevlm.core.packing import take
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._blocks import BlockMethod
from sparsevlm.runtime.blocks import Blocks, Tokens
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.vision import Tower, find_towers, mean_attention


@dataclass(frozen=True)
class FiCoCoV(BlockMethod):
    """Filter, correlate, compress in the vision tower.

    Attributes:
        start: 0-based first block; None = half of the tower's blocks (12 of 24).
        lam: weight of the patches' attention against that of CLS (paper: .35).
        eps: quantile of the correlations that count (.998).
        window: side of the windows of the local penalty (2); 1 = no penalty.
        scaling: of the largest redundancy in a window (2).
        merge: False discards without compressing.
    """

    start: int | None = None
    lam: float = 0.35
    eps: float = 0.998
    window: int = 2
    scaling: float = 2.0
    merge: bool = True

    name: ClassVar[str] = "ficoco_v"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1 or not 0 <= self.eps <= 1:
            raise ValueError(f"lam {self.lam} and eps {self.eps} must be between 0 and 1")
        if self.window < 1 or self.scaling < 1:
            raise ValueError(f"window {self.window} and scaling {self.scaling} must be at least 1")

    def check(self, family: Family) -> None:
        for tower in find_towers(family, self.name):
            if self.start is not None and not 0 <= self.start <= tower.layer:
                raise ValueError(f"start {self.start} must be between 0 and {tower.layer}, the last block that is read")

    def layers(self, tower: Tower) -> range:
        start = tower.module.config.num_hidden_layers // 2 if self.start is None else self.start
        return range(min(start, tower.layer), tower.layer + 1)

    def block(self, run: Blocks, i: int, layer: nn.Module, tokens: Tokens) -> None:
        tower = run.tower
        x = run.attend(layer, tokens)
        blocks = self.layers(tower)
        left = spread(tower.patches, tokens.count, len(blocks))[i - blocks[0]]
        if left < x.shape[1] - 1:
            attention = mean_attention(layer.self_attn, tokens.queries, tokens.keys)
            redundancy = self.redundancy(attention, tokens.index[:, 1:] - 1, tower.grid)
            order = rank_by_score(redundancy)
            drop = x.shape[1] - 1 - left
            gone, stay = order[:, :drop] + 1, order[:, drop:].sort(1).values + 1
            kept = compress(x, attention, gone, stay, self.eps) if self.merge else take(x, stay)
            x = torch.cat([x[:, :1], kept], 1)
            tokens.index = torch.cat([tokens.index[:, :1], tokens.index.gather(1, stay)], 1)
        tokens.x = run.mlp(layer, x)

    def redundancy(self, attention: Tensor, places: Tensor, grid: int) -> Tensor:
        """[n, t] of patches at `places` [n, t] of the picture, from [n, 1 + t, 1 + t] attention; high ones go."""
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
    """Tokens after each of `blocks` blocks that remove the same number each, up to rounding."""
    return [tokens - ((tokens - left) * (i + 1) * 2 + blocks) // (2 * blocks) for i in range(blocks - 1)] + [left]


def compress(x: Tensor, attention: Tensor, gone: Tensor, stay: Tensor, eps: float) -> Tensor:
    """States [n, s, d] of the tokens `stay` [n, s] with those of `gone` [n, g] spread over them; x is [n, t, d]."""
    rows = take(attention, gone).gather(2, stay[:, None].expand(-1, gone.shape[1], -1))
    targets = int((1 - eps) * (rows.shape[2] - 1) + 1e-9) + 1  # as many are at or above the eps-quantile
    value, place = rows.topk(targets, dim=2)
    alpha = torch.zeros_like(rows).scatter(2, place, value / value.sum(2, keepdim=True).clamp(min=1e-30))
    wide = x.to(alpha.dtype)
    kept = take(wide, stay) + alpha.transpose(1, 2) @ take(wide, gone)
    return (kept / (1 + alpha.sum(1)[..., None])).to(x.dtype)
