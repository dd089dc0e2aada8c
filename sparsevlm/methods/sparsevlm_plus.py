"""SparseVLM+ (the authors' v2.0, December 2025; `USE_VERSION=2_0` in their main branch).

Differences from SparseVLM: attention is divided by the RoPE kernel of its distance ("attention gravity"), only the
heads that look at the picture most are averaged ("priority heads"), survivors keep their original positions, and
nothing is recycled; the keep lists are larger instead. There is no paper of its own; the code is the source
(modelling_sparse_llama.py:242-251, 312; score.py:11-14, 48-55).

The kernel is applied to *probabilities*. For head size 128 and theta 1e4 it falls to zero at distance 1707, and beyond
that the sign of scores flips (long prompts, video): a warning says so. `kernel_floor` clamps it from below; the default
follows the code. Deviations: the number of priority heads is a share of the heads (the code: 14, which fails below 14
heads); the kernel is made for the rater rows only instead of L x L per head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevlm.core.packing import take
from sparsevlm.core.rope_kernel import first_nonpositive_distance, rope_kernel
from sparsevlm.core.scores import mean_scores
from sparsevlm.methods.sparsevlm import SparseVLM
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM+ with fixed lists. Further options as in `SparseVLM`.

    Attributes:
        heads: priority heads: a share of the heads (0 < share <= 1, rounded; 14/32 gives the authors' 14 of 32), or a
            whole number above 1 of them.
        kernel: divide by the RoPE kernel (False: the ablation without gravity correction).
        kernel_floor: smallest value the kernel may take; None = the authors' unclamped one.
    """

    recycle: float = 0.0
    positions: str = "original"
    heads: float = 14 / 32
    kernel: bool = True
    kernel_floor: float | None = None

    name: ClassVar[str] = "sparsevlm_plus"
    # keep lists of the authors' score.py:11-14 for USE_VERSION=2_0; the mean tokens they leave: 64.4 ... 192.4
    lists: ClassVar[tuple[tuple[int, tuple[int, ...]], ...]] = (
        (64, (66, 34, 20)),
        (96, (246, 54, 28)),
        (128, (238, 108, 60)),
        (192, (300, 200, 118)),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads <= 0 or (self.heads > 1 and self.heads != int(self.heads)):
            raise ValueError(f"heads {self.heads} is neither a share in (0, 1] nor a whole number of heads")
        if self.kernel_floor is not None and self.kernel_floor <= 0:
            raise ValueError(f"kernel_floor {self.kernel_floor} is not positive. Use a positive number or None")

    def check(self, family: Family) -> None:
        super().check(family)
        total: int = family.decoder.config.num_attention_heads
        if self.heads > total:
            raise ValueError(f"heads {self.heads:g} is above the model's {total} attention heads. Use a share instead")

    def attach(self, family: Family) -> int | None:
        """Return the distance from which on the kernel is not positive; None = not below 16384, or not known."""
        frequencies: Tensor = family.decoder.rotary_emb.inv_freq
        return None if frequencies.is_meta else first_nonpositive_distance(frequencies.detach().cpu(), 16384)

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        super().begin(prefill, embeddings)
        span, limit = prefill.prompt.past + prefill.length, prefill.attached
        if self.kernel and self.kernel_floor is None and limit is not None and span > limit:
            warnings.warn(
                f"SparseVLM+: the RoPE kernel is not positive at distances from {limit} on, and this prompt "
                f"spans {span} tokens: scores of tokens that far from a rater change their sign. Use kernel_floor to "
                "clamp it.",
                stacklevel=2,
            )

    def score(self, stage: Stage) -> Tensor:
        prefill = stage.prefill
        rows = stage.visual_columns(stage.attention(prefill.tail))  # [B, H, T, V]
        if self.kernel:
            rows = rows / self._kernel(stage)[:, None]
        assert prefill.weights is not None  # set in `begin`
        weights = prefill.weights.to(rows.dtype)
        per_head = rows * weights[:, None, :, None]
        if stage.visual_valid is not None:
            per_head = per_head.masked_fill(~stage.visual_valid[:, None, None], 0)
        total = rows.shape[1]
        count = int(self.heads) if self.heads > 1 else max(1, int(self.heads * total + 0.5))
        best = per_head.sum((2, 3)).topk(count, dim=1).indices
        return mean_scores(take(rows, best), weights)

    def _kernel(self, stage: Stage) -> Tensor:
        """Compute the kernel [B, T, V] between the last `tail` positions and those of the visual tokens."""
        batch, tail = stage.hidden.shape[0], stage.prefill.tail
        cos, sin = (t.expand(batch, -1, -1) for t in stage.prefill.rope)
        visual = take(cos, stage.visual_index), take(sin, stage.visual_index)
        kernel = rope_kernel((cos[:, -tail:], sin[:, -tail:]), visual)
        return kernel if self.kernel_floor is None else kernel.clamp(min=self.kernel_floor)
