"""SparseVLM (arXiv 2410.04417, ICML 2025): text-guided, training-free sparsification with token recycling.

1. Raters, once, from the embeddings that enter the language model: text tokens after the image that are more relevant
   to the picture than the mean text token (section 3.1).
2. At three layers a visual token's score is the attention that the raters pay it, averaged over heads and raters
   (section 3.1, eq. 2-3).
3. The best ones stay; how many is a fixed list per budget, as in the authors' v1.5 and main branches. (The paper's
   rank-adaptive rule is the method `sparsevlm_rank`; the released code has no rank.)
4. The better part of what is dropped is clustered and averaged into a few recycled tokens (section 3.3).

The defaults are the authors' released v1.5 (= ICML) code. Where it differs from the paper the code is followed, since
it made the numbers: see `core.raters`, `core.recycling`. Deviations from it, all without effect on its published
settings:
- a stage that has fewer tokens than it may keep drops none (the code drops one; `always_drop=True`);
- densities that tie are ordered by index instead of by random noise; scores are float32 in half precision;
- with several images the raters are the text after the last one (in the code: also the tokens of the second image);
- a prompt with a single text token is rated by it (the code: no rater, NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevlm.core.packing import take
from sparsevlm.core.precision import at_least_float32
from sparsevlm.core.raters import NUMBER, RULES, is_rule, select_raters
from sparsevlm.core.recycling import density_peaks, merge_weights
from sparsevlm.core.scores import mean_scores, shares_of_rows
from sparsevlm.methods.base import one_of
from sparsevlm.methods.bases import PruneByLists
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage

EVERY_TOKEN = "tokens"
PRIOR = "prior"


def attention_of_all(stage: Stage) -> Tensor:
    """Return the attention [B, L, V] that every row pays each visual token, mean over heads, in float32."""
    return stage.visual_columns(stage.attention(stage.hidden.shape[1]).mean(1))


def paid_by_visual(stage: Stage, rows: Tensor) -> Tensor:
    """Sum `attention_of_all` over the rows of visual tokens: [B, V]."""
    paid = rows.gather(1, stage.visual_index[..., None].expand(-1, -1, rows.shape[-1]))
    if stage.visual_valid is not None:
        paid = paid * stage.visual_valid[..., None]
    return paid.sum(1)


@dataclass(frozen=True)
class SparseVLM(PruneByLists):
    """SparseVLM with fixed lists (v1.5 / ICML). `layers` and `keep` as in `PruneByLists`.

    Attributes:
        raters: "paper" (authors' strict mean), "all" text tokens, "centred" (after subtracting the mean visual
            embedding), "last" (the last text token), "prior": all text tokens, each one's attention over its own prior,
            which is what it pays the visual tokens on average, so that none, a colon say, can win alone (neither in the
            paper nor in its code; `SparseVLM` only), a number (so many text tokens, the most relevant) or "tokens":
            every token, visual ones too, the baseline of the paper's Figure 5 (sums then, not means: the order is the
            same). That one needs the attention of all rows, B x heads x L x L: for ablations only.
        recycle: share of the dropped tokens that is recycled (tau of eq. 8); 0 = plain pruning.
        cluster: recycled tokens per pooled token (theta of eq. 9).
        merge: "mean" of a cluster (the code) or "sum" (eq. 10).
        positions: position ids of the survivors: "renumber" to 0 ... n - 1 per layer (the code) or "original".
        recycled_at: "end" of the visual tokens (the code) or the place of the cluster's "centre".
        always_drop: drop at least one token per stage, as the code does.
        early_drop: let a pruning layer compute only the rows that outlive it: what is dropped needs no query, no
            output projection and no MLP there, only its key and value. The result is the same (to rounding); where it
            would not be (sliding windows, caches other than the dynamic one, FlashAttention, samples that lose
            different numbers of tokens) the plain form runs. False: the plain form, every row of the layer computed,
            as the authors do; `output_hidden_states` then records that layer in full length.
    """

    raters: str | int = "paper"
    recycle: float = 0.3
    cluster: float = 0.1
    merge: str = "mean"
    positions: str = "renumber"
    recycled_at: str = "end"
    always_drop: bool = False
    early_drop: bool = True

    name: ClassVar[str] = "sparsevlm"
    needs_text: ClassVar[bool] = True
    # keep lists of the authors' score.py:11-14 at layers 2, 6, 15; the mean tokens they leave: 64.81 ... 192.03
    lists: ClassVar[tuple[tuple[int, tuple[int, ...]], ...]] = (
        (64, (66, 30, 17)),
        (96, (238, 48, 26)),
        (128, (303, 110, 36)),
        (192, (300, 200, 110)),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raters not in (EVERY_TOKEN, PRIOR) and not is_rule(self.raters):
            known = ", ".join((*RULES, PRIOR, EVERY_TOKEN))
            raise ValueError(f"rater rule {self.raters!r} is unknown; known: {known}, or {NUMBER}")
        if self.raters == PRIOR and type(self).score is not SparseVLM.score:
            raise ValueError(
                f"raters={PRIOR!r} is an option of sparsevlm only; {self.name} scores otherwise. Use 'all'"
            )
        one_of(self.merge, ("mean", "sum"), "merge")
        one_of(self.positions, ("renumber", "original"), "positions")
        one_of(self.recycled_at, ("end", "centre"), "recycled_at")
        if not 0 <= self.recycle <= 1 or not 0 <= self.cluster <= 1:
            raise ValueError(f"recycle {self.recycle} and cluster {self.cluster} are shares between 0 and 1")

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        if not prefill.points:
            return
        visual = take(embeddings, prefill.visual_index)
        text = embeddings[:, -prefill.tail :]
        rule = "all" if self.raters in (EVERY_TOKEN, PRIOR) else self.raters
        prefill.set_raters(select_raters(visual, text, prefill.visual_valid, prefill.text_valid, rule))

    def score(self, stage: Stage) -> Tensor:
        weights = stage.prefill.weights
        assert weights is not None  # set in `begin`
        if self.raters == EVERY_TOKEN:
            rows, raters = attention_of_all(stage), weights > 0
            return (rows[:, -raters.shape[1] :] * raters[..., None]).sum(1) + paid_by_visual(stage, rows)
        rows = stage.attention(stage.prefill.tail)
        if self.raters == PRIOR:
            return shares_of_rows(stage.visual_columns(rows), weights, stage.visual_valid)
        return stage.visual_columns(mean_scores(rows, weights))

    def merge_tokens(self, tokens: Tensor, clusters: Tensor, width: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        centres, group = density_peaks(tokens, clusters, width, valid)
        dtype = at_least_float32(tokens.dtype)
        return centres, merge_weights(group, width, valid, self.merge, dtype)
