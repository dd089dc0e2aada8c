"""FastV: an image is worth 1/2 tokens after layer 2 (Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764).

1. Layers 0 ... K - 1 see every visual token.
2. Score of a visual token = the attention that the last prompt token pays it in layer K - 1, averaged over the heads
   (authors' transformers fork, modeling_llama.py `fastv_forward`).
3. The best `keep` stay for the layers from K on, in their order and with their original position ids.

In terms of this library it prunes once, on the output of layer K - 1.

What a budget means is not said in the papers that compare with FastV. `match="leaving"` makes the mean of the tokens
that *leave* the layers equal to it, as for every method here: layer K - 1 counts with the kept tokens although it
computes all. With K = 3 of 32 layers, 192, 128 and 64 of 576 tokens keep 166, 98 and 30; these are the numbers whose
multiply-adds fit the FastV row of SparseVLM's Table 1 (2.12, 1.71, 1.31 T against 2.11, 1.70, 1.29 printed).
`match="entering"` equates the mean of what *enters* the layers, the cost: the fair row, with the authors' `k=2` it
keeps the same 166, 98 and 30.

Deviations from the authors' code: without a KV cache it prunes anew at every generated token, from another last token
(FastV's "original" form); here the prompt decides once, with and without a cache. Attention is float32 in half
precision, equal scores go by index. With early_drop layer K - 1 computes only the rows that outlive it; same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from sparsevlm.budget import Schedule, check_budget, check_layers, explicit_schedule, scale_layers, start_earlier
from sparsevlm.core.raters import select_raters
from sparsevlm.core.scores import mean_scores
from sparsevlm.methods.base import Method, int_tuple, one_of
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage

MATCHES = ("leaving", "entering")
_LAYER = 2  # of 32: K = 3


@dataclass(frozen=True)
class FastV(Method):
    """FastV.

    Attributes:
        k: the authors' K, the number of layers that see everything. None = 3 of 32 layers, scaled to the model's depth
            like SparseVLM's first pruning layer (32 layers: 3; 40: 4; 12: 2), and less where these layers alone would
            take up more than 0.8 of the budget.
        keep: visual tokens kept, instead of a budget.
        match: which mean equals the budget, "leaving" or "entering".
        early_drop: layer K - 1 computes only the rows that outlive it.
    """

    k: int | None = None
    keep: int | None = None
    match: str = "leaving"
    early_drop: bool = True

    name: ClassVar[str] = "fastv"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.match, MATCHES, "match")
        for option in ("k", "keep"):
            value = int_tuple(getattr(self, option), option)
            if value is not None and (len(value) != 1 or value[0] < 1):
                raise ValueError(f"{option} {getattr(self, option)!r} must be one whole number of at least 1")
            self._set(option, value and value[0])
        if self.keep is not None and self.budget is not None:
            raise ValueError("give either a budget or keep, not both")

    def check(self, family: Family) -> None:
        if self.k is not None:
            check_layers((self.k - 1,), family.n_layers)

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        if self.keep is not None:
            layer = scale_layers(n_layers, (_LAYER,))[0] if self.k is None else self.k - 1
            return explicit_schedule(n_visual, n_layers, (layer,), (self.keep,))
        if self.budget in (None, "full"):
            return super().plan(n_visual, n_layers)
        return prune_once(self.budget, n_visual, n_layers, self.k, self.match)

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        rate_by_last_token(prefill, embeddings)

    def score(self, stage: Stage) -> Tensor:
        return last_token_scores(stage)


def rate_by_last_token(prefill: Prefill, embeddings: Tensor) -> None:
    """Make the last token of each prompt the only rater."""
    text = embeddings[:, embeddings.shape[1] - prefill.tail :]
    prefill.set_raters(select_raters(text, text, None, prefill.text_valid, "last"))


def last_token_scores(stage: Stage) -> Tensor:
    """[B, V] attention that the last token of each prompt pays the visual tokens, averaged over the heads."""
    prefill = stage.prefill
    # elsewhere than in the last row: right padding, or candidates of assisted decoding behind the prompt
    tail = 1 if prefill.prompt.text[:, -1].all() else prefill.tail
    return stage.visual_columns(mean_scores(stage.attention(tail), prefill.weights[:, -tail:]))


@lru_cache(maxsize=4096)
def prune_once(budget: int, n_visual: int, n_layers: int, k: int | None, match: str) -> Schedule:
    """Schedule that prunes once, on the output of layer k - 1, so that the mean `match` is the budget.

    Raises:
        ValueError: budget outside 1 ... n_visual, or out of reach of k.
    """
    check_budget(budget, n_visual)
    counted = 1 if match == "leaving" else 0  # layer k - 1 counts with the kept tokens
    if k is None:
        untouched = start_earlier(scale_layers(n_layers, (_LAYER,))[0] + 1 - counted, budget, n_visual, n_layers)
        k = max(untouched + counted, 1)
    full = k - counted
    rest = n_layers - full
    keep = int((budget * n_layers - full * n_visual) / rest + 0.5)
    if keep < 1:
        floor = (full * n_visual + rest) / n_layers
        raise ValueError(
            f"budget {budget} is out of reach of k={k} with match={match}: the layers that count with all {n_visual} "
            f"visual tokens alone make a mean of at least {floor:.1f}. Use a smaller k, or at least that budget"
        )
    return explicit_schedule(n_visual, n_layers, (k - 1,), (keep,))
