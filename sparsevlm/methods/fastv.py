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
from typing import ClassVar

from torch import Tensor

from sparsevlm.core.raters import select_raters
from sparsevlm.core.scores import mean_scores
from sparsevlm.methods.bases import PruneOnce
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage


@dataclass(frozen=True)
class FastV(PruneOnce):
    """FastV. `k`, `keep`, `match` and `early_drop` as in `PruneOnce`; `k` is the authors' K."""

    name: ClassVar[str] = "fastv"
    needs_text: ClassVar[bool] = True

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        rate_by_last_token(prefill, embeddings)

    def score(self, stage: Stage) -> Tensor:
        return last_token_scores(stage)


def rate_by_last_token(prefill: Prefill, embeddings: Tensor) -> None:
    """Make the last token of each prompt the only rater."""
    text = embeddings[:, embeddings.shape[1] - prefill.tail :]
    prefill.set_raters(select_raters(text, text, None, prefill.text_valid, "last"))


def last_token_scores(stage: Stage) -> Tensor:
    """Return the attention [B, V] that the last token of each prompt pays the visual tokens, the mean over heads."""
    prefill = stage.prefill
    assert prefill.weights is not None  # set in `begin`
    # elsewhere than in the last row: right padding, or candidates of assisted decoding behind the prompt
    tail = 1 if prefill.prompt.text[:, -1].all() else prefill.tail
    return stage.visual_columns(mean_scores(stage.attention(tail), prefill.weights[:, -tail:]))
