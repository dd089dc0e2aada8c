"""RESTORE (arXiv 2606.01711, ICML 2026): half pruned by another method, half merged, and attention calibrated.

A wrapper around a method that chooses tokens before the language model (`base`). Of T rows

1. floor(T / 2) are tokens that the base method keeps, as they are.
2. The others are merged from all that is left, by the projector's outputs. C = their cosines, R_i = sum_j C_ij;
   score_i = R_i (1 - m_i), m_i = the highest C_ij of a token j with R_j < R_i, 0 without one. The tokens of highest
   score are anchors, every other one joins the most similar anchor; a row is the plain mean of its group.
3. A row stands at the position of the median (the lower one) of its group; text keeps the positions that it has in the
   unpruned prompt, and so does what is generated.
4. While the prompt is read, log(c - D(distance)) is added to the logits of all pairs of tokens, D = the mean of
   cos(distance * theta) over the rotary frequencies; and log(size) to those of each key, size = tokens of its group. In
   layer 0 every visual key has the size (all tokens) / T instead. Generated tokens add log(size) only.

The paper has m_i over tokens with a higher R (eq. 6); the authors' code, which is recorded and the default, compares
the other way round (tore/merge.py). `anchors="paper"` follows the paper.

Source: the authors' repository (cvlab-yonsei/RESTORE, 9b27e68; GPL-3, read and not copied). Bases there: HoloV,
DivPrune, VisPruner, each with its own defaults for its half.

Deviations, none with an effect on LLaVA-1.5 and one prompt: frequencies, lengths and the number of tokens before the
picture, constants there, are the model's and the prompt's own. Where theirs has no case: several pictures share T, and
each is pruned, merged and sized by itself; a prompt that loses nothing gets no bias; keys of earlier turns get their
sizes only, and so do the rows of a call that goes on with the cache; a frame's own CLS token, where the model takes it,
is dropped first. Attention has to be sdpa or eager (`calibrate=False` needs neither).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.core.packing import pack, take
from sparsevlm.core.precision import at_least_float32
from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods._vision import VisionMethod, patches, slots
from sparsevlm.methods.base import one_of
from sparsevlm.runtime.bias import LogitBias
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.rows import column
from sparsevlm.runtime.vision import Pictures, Reduced

BASES = ("holov", "divprune", "vispruner", "fastervlm", "scope")


@dataclass(frozen=True)
class RESTORE(VisionMethod):
    """Merging, original positions and calibrated attention around another method.

    Attributes:
        base: method that chooses what is kept, with its defaults.
        share: share of the rows that are kept tokens.
        anchors: "code" or "paper", which tokens an anchor has to differ from.
        c: of the bias by distance, above 1; a large one makes it constant.
        calibrate: add to attention logits.
    """

    base: str = "holov"
    share: float = 0.5
    anchors: str = "code"
    c: float = 2.0
    calibrate: bool = True

    name: ClassVar[str] = "restore"
    positions: ClassVar[str] = "original"
    captures: ClassVar[bool] = True
    after_projector: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True  # text in a call of its own would miss the bias

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.base, BASES, "base")
        one_of(self.anchors, ("code", "paper"), "anchors")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {self.share} is a share between 0 and 1")
        if self.c <= 1:
            raise ValueError(f"c {self.c} must be above 1, the largest mean cosine")

    @property
    def adds_bias(self) -> bool:
        return self.calibrate and self.active

    # ---- rows --------------------------------------------------------------------------------------------------------
    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        x, total = patches(pictures), pictures.tower.patches
        kept = self._kept(pictures, int(count * self.share))
        mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, kept, 1)
        rows, origin, sizes = [take(x, kept)], [kept], [torch.ones_like(kept)]
        if kept.shape[1] < count:
            rest = pack(~mask, total - kept.shape[1])
            member = groups(take(x, rest), count - kept.shape[1], self.anchors)
            size = member.sum(2)
            wide = at_least_float32(x.dtype)
            mean = member.to(wide) @ take(x, rest).to(wide) / size[..., None]
            middle = member & (member.cumsum(2) == (size[..., None] + 1) // 2)
            rows.append(mean.to(x.dtype))
            origin.append(rest.gather(1, middle.int().argmax(2)))
            sizes.append(size)
        places, order = torch.cat(origin, 1).sort(1)
        rows, sizes = take(torch.cat(rows, 1), order), torch.cat(sizes, 1).gather(1, order)
        return Reduced(rows, places + int(pictures.tower.cls), sizes=sizes)

    def _kept(self, pictures: Pictures, count: int) -> Tensor:
        """Return the patches [n, count] that the base method keeps."""
        from sparsevlm.methods import method_class

        base = method_class(self.base)()
        if not count:
            return torch.empty(pictures.features.shape[0], 0, dtype=torch.int64, device=pictures.features.device)
        features = patches(pictures) if base.after_projector else pictures.states[:, 1:]
        view = replace(pictures, features=features, tower=replace(pictures.tower, cls=False))
        return base.reduce(view, count).origin

    # ---- attention ---------------------------------------------------------------------------------------------------
    def stand_at(self, prefill: Prefill, index: Tensor) -> Tensor:
        return self._places(prefill).gather(1, index)

    def _places(self, prefill: Prefill) -> Tensor:
        """Return the row [B, L] of the call whose position each of its rows takes."""
        rows = torch.arange(prefill.prompt.length, device=prefill.device)
        return slots(prefill, lambda made, tokens: made.origin, rows.repeat(prefill.batch, 1), among_rows=True)

    def logit_bias(self, prefill: Prefill) -> LogitBias | None:
        if not self.adds_bias:
            return None
        p, source = prefill, prefill.source
        dtype = at_least_float32(p.rope[0].dtype)
        one = torch.ones(p.batch, p.prompt.length, dtype=dtype, device=p.device)
        sizes = slots(p, _sizes, one)
        uniform = slots(p, lambda made, tokens: _sizes(made, tokens, uniform=True), one)
        lost = column([s.after[0] < s.n_visual if s.after else False for s in p.schedules], p.device).bool()
        asked = (source <= column(p.prompt.last, p.device)) & lost
        positions = p.call_positions.expand(p.batch, -1).gather(1, self._places(p).gather(1, source))
        near = mean_cosine(positions, p.family.decoder.rotary_emb.inv_freq)
        pairs = (self.c - near).log().to(dtype) * asked[..., None]
        first, later = (x.gather(1, source).log() for x in (uniform, sizes))
        return LogitBias(first, later, pairs)


def groups(x: Tensor, count: int, anchors: str) -> Tensor:
    """Group tokens [n, M, d] around `count` anchors.

    Returns:
        [n, count, M] bool, who belongs to each anchor, these in ascending order.
    """
    cosines = cosine_matrix(x)
    total = cosines.sum(2)
    other = total[:, None] < total[:, :, None] if anchors == "code" else total[:, None] > total[:, :, None]
    nearest = cosines.masked_fill(~other, -1).amax(2).masked_fill(~other.any(2), 0)
    chosen = rank_by_score(total * (1 - nearest))[:, :count].sort(1).values
    own = torch.arange(count, device=x.device).expand_as(chosen)
    similar = cosines.gather(2, chosen[:, None].expand(-1, x.shape[1], -1))
    group = similar.argmax(2).scatter(1, chosen, own)
    return group[:, None] == own[..., None]


def mean_cosine(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return the mean over frequencies [d / 2] of cos(distance * frequency), [B, L, L] float64, of positions [B, L]."""
    angle = positions[..., None].double() * frequencies.to(positions.device, torch.float64)
    x = torch.cat([angle.cos(), angle.sin()], -1)  # cos(a - b) = cos a cos b + sin a sin b
    return x @ x.mT / frequencies.shape[0]


def _sizes(made: Reduced, tokens: int, uniform: bool = False) -> Tensor:
    """Return tokens [n, T] per row: those of its group, or, `uniform`, the picture's tokens over its rows."""
    if made.sizes is None:
        return torch.ones_like(made.origin, dtype=torch.float32)
    if not uniform:
        return made.sizes
    return made.sizes.sum(1, keepdim=True).float().expand_as(made.sizes) / made.sizes.shape[1]
