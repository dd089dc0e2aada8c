"""The masked model: what pruning must equal, written without the library.

One conversation by itself, without padding, cache or batch, is run through the model's own layers in full length. No
row ever moves: a dropped token is hidden from the layers that follow, positions are numbered anew where the method's
contract says so, a merged token is written into the row of its cluster's centre. What is dropped is given by a trace;
`tests.fuzz.decisions` works out independently what it should have been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.fuzz.case import decoder_of
from tests.restatement import density_peaks


class Undecided(Exception):
    """Two outcomes are closer to each other than rounding: neither is wrong."""


class Mismatch(AssertionError):
    """The library said or computed something else than the masked model."""


@dataclass
class Cut:
    """What a trace says of one prompt at one stage.

    Attributes:
        layer: stage, -1 = the model's input.
        kept: kept tokens, as positions among the visual tokens that entered.
        merged: number of merged tokens made.
        scores: of the tokens that entered; None = not scored.
        tokens_in, tokens_out: visual tokens.
    """

    layer: int
    kept: list[int]
    merged: int
    scores: Tensor | None
    tokens_in: int
    tokens_out: int


@dataclass
class Part:
    """One turn of a conversation, as rows of it.

    Attributes:
        start, end: the rows that the prompt of this turn brings.
        visual: rows of its visual tokens, in order; fewer from stage to stage.
        cuts: stages.
        raters: rows that rate, as the trace has them; None = not said.
        entered: rows of all its visual tokens.
    """

    start: int
    end: int
    visual: list[int]
    cuts: list[Cut] = field(default_factory=list)
    raters: list[int] | None = None
    entered: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """Rows after the last visual token."""
        return list(range(self.entered[-1] + 1, self.end)) if self.entered else []


@dataclass
class Contract:
    """What a method promises about rows that go on.

    Attributes:
        renumber: stages after which positions are numbered anew.
        recycled_at: "end" or "centre".
        share, cluster, merge: of recycling.
        solved: a budget decides how many tokens stay; a stage that has no room for merged ones does without.
        decide: checks a stage's decision, and may change states; see `tests.fuzz.decisions`.
    """

    renumber: Callable[[int], bool]
    recycled_at: str = "end"
    share: float = 0.0
    cluster: float = 0.1
    merge: str = "mean"
    solved: bool = False
    decide: Callable | None = None


class Conversation:
    """The masked run of one conversation.

    Attributes:
        hidden: [T, D] states that enter `layer`.
        alive: [T] bool, rows that this layer may look at.
        order: [T], a row sees the alive rows of no larger order: a merged token may come behind tokens it precedes.
        positions: [T].
        entered: [T, D] states that entered the layer before.
        seen: [T, T] bool, which rows looked at which there.
    """

    def __init__(self, model: nn.Module, embeds: Tensor, parts: list[Part], contract: Contract, first: int = 0):
        self.model, self.decoder, self.parts, self.contract = model, decoder_of(model), parts, contract
        self.hidden, self.embeds, self.first = embeds, embeds, first
        self.alive = torch.ones(len(embeds), dtype=torch.bool)
        self.order = torch.arange(len(embeds), dtype=torch.float64)
        self.positions = torch.arange(len(embeds)) + first
        self.entered: Tensor | None = None
        self.held: list[int] = []  # rows alive in each layer
        self.alive_at: list[Tensor] = []
        for part in parts:
            part.entered = list(part.visual)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Logits [T, vocab]; those of rows that are not `alive` in the end mean nothing."""
        for i, layer in enumerate(self.decoder.layers):
            self._stage(i - 1)
            self.alive_at.append(self.alive.clone())
            rope = self.decoder.rotary_emb(self.hidden[None], self.positions[None])
            self.entered = self.hidden
            out = layer(self.hidden[None], attention_mask=self._mask(i), position_embeddings=rope)
            self.hidden = (out if isinstance(out, Tensor) else out[0])[0]
        return self.model.lm_head(self.decoder.norm(self.hidden))

    def _mask(self, layer: int) -> Tensor:
        seen = self.sees() & self.near(layer) | torch.eye(len(self.alive), dtype=torch.bool)
        if self.decoder.config._attn_implementation == "eager":
            lowest = torch.finfo(self.hidden.dtype).min
            seen = torch.zeros(seen.shape, dtype=self.hidden.dtype).masked_fill(~seen, lowest)
        return seen[None, None]

    def sees(self) -> Tensor:
        """[T, T] bool: which rows look at which."""
        return self.alive & (self.order <= self.order[:, None])

    def near(self, layer: int) -> Tensor:
        """[T, T] bool: what a layer's sliding window lets rows look at, counted in positions."""
        config, row = self.decoder.config, self.positions
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if window is None or (types is not None and types[layer] != "sliding_attention"):
            return torch.ones(len(row), len(row), dtype=torch.bool)
        return row[:, None] - row < window

    # ---- stages ------------------------------------------------------------------------------------------------------
    def _stage(self, layer: int) -> None:
        changed, self.seen = False, self.sees()
        for part in self.parts:
            for cut in part.cuts:
                if cut.layer == layer:
                    changed |= self._cut(part, cut)
        if changed and self.contract.renumber(layer):
            rows = self.alive.nonzero()[:, 0]
            rows = rows[self.order[rows].argsort()]
            self.positions[rows] = torch.arange(len(rows)) + self.first

    def _cut(self, part: Part, cut: Cut) -> bool:
        if cut.tokens_in != len(part.visual):
            raise Mismatch(f"layer {cut.layer}: {cut.tokens_in} visual tokens entered, there are {len(part.visual)}")
        if cut.kept != sorted(set(cut.kept)) or (cut.kept and not 0 <= cut.kept[0] <= cut.kept[-1] < cut.tokens_in):
            raise Mismatch(f"layer {cut.layer}: kept {cut.kept} are not positions among {cut.tokens_in}, ascending")
        if cut.tokens_out != len(cut.kept) + cut.merged:
            raise Mismatch(f"layer {cut.layer}: {cut.tokens_out} left, {len(cut.kept)} kept and {cut.merged} merged")
        if len(cut.kept) == len(part.visual):
            return False
        ranked = self._ranked(part, cut)
        if self.contract.decide is not None:
            self.contract.decide(self, part, cut)
        rows = part.visual
        dropped = [rows[i] for i in ranked if i not in set(cut.kept)]
        self.alive[dropped] = False
        left = [rows[i] for i in cut.kept]
        if self.contract.share:
            left += self._merge(dropped, cut, max(rows, key=self._at))
        elif cut.merged:
            raise Mismatch(f"layer {cut.layer}: {cut.merged} merged tokens, and nothing is recycled")
        part.visual = sorted(left, key=self._at)
        return True

    @staticmethod
    def _ranked(part: Part, cut: Cut) -> list[int]:
        """Tokens from high to low score, which must agree with what was kept."""
        if cut.scores is None:
            return list(range(cut.tokens_in))
        if len(cut.scores) != cut.tokens_in:
            raise Mismatch(f"layer {cut.layer}: {len(cut.scores)} scores of {cut.tokens_in} tokens")
        scores = cut.scores.tolist()
        ranked = sorted(range(cut.tokens_in), key=lambda i: -scores[i])
        if sorted(ranked[: len(cut.kept)]) != cut.kept:
            raise Mismatch(f"layer {cut.layer}: kept {cut.kept}, the best are {sorted(ranked[: len(cut.kept)])}")
        return ranked

    def _room(self, cut: Cut) -> bool:
        """Whether some split into kept and merged tokens leaves exactly what a budget's solver wants to be left."""
        c = self.contract
        for keep in range(1, cut.tokens_out + 1):
            gone = cut.tokens_in - keep
            pool = min(int(c.share * gone) + 1, gone)
            if keep + min(int(c.cluster * pool) + 1, pool) == cut.tokens_out:
                return True
        return False

    def _at(self, row: int) -> float:
        return float(self.order[row])

    def _merge(self, dropped: list[int], cut: Cut, last: int) -> list[int]:
        """Rows of the tokens merged out of `dropped`, which come in order of score."""
        c = self.contract
        pool = dropped[: min(int(c.share * len(dropped)) + 1, len(dropped))]
        k = min(int(c.cluster * len(pool)) + 1, len(pool))
        if c.solved and not cut.merged and not self._room(cut):
            return []
        if k != cut.merged:
            raise Mismatch(f"layer {cut.layer}: {cut.merged} merged tokens, recycling {len(dropped)} makes {k}")
        tokens = self.hidden[pool]
        wide = tokens.double()
        decisive(wide, k, tokens.dtype)
        centres, group = density_peaks(wide, k)
        made = []
        for j in range(k):
            members = wide[group == j]
            made.append(members.sum(0) / (len(members) + 1e-6 if c.merge == "mean" else 1))
        rows = [pool[i] for i in centres]
        self.hidden = self.hidden.clone()
        self.hidden[rows] = torch.stack(made).to(tokens.dtype)
        self.alive[rows] = True
        if c.recycled_at == "end":
            follow = self.order > self.order[last]
            room = float(self.order[follow].min() - self.order[last]) if follow.any() else 1.0
            self.order[rows] = self.order[last] + room * torch.arange(1, k + 1, dtype=torch.float64) / (k + 1)
        return rows


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding may make."""
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]


def decisive(x: Tensor, k: int, dtype: torch.dtype) -> None:
    """Raise Undecided where rounding could choose other centres or clusters of tokens [m, D]."""
    if k == 1:
        return
    close = tolerance(dtype)
    distance = (x[:, None] - x).square().sum(-1).sqrt() / x.shape[1] ** 0.5
    density = (-(distance.sort(1).values[:, :k] ** 2).mean(1)).exp()
    spread = density[:, None] - density
    scale = torch.maximum(density[:, None], density)
    # equal densities (k = 2: mutual neighbours) are equal; others must differ clearly
    unclear = (spread.abs() > 1e-13 * scale) & (spread.abs() <= close * scale)
    if bool(unclear.any()) or float(density.min()) < torch.finfo(dtype).tiny * 1e6:
        raise Undecided("densities")
    away = torch.where(density > density[:, None], distance, distance.max()).amin(1)
    peak = (away * density).sort(descending=True).values
    if bool(((peak[:-1] - peak[1:])[:k] <= close * peak[:-1][:k]).any()):
        raise Undecided("centres")
    if k == len(x):
        return
    centres, _ = density_peaks(x, k)
    near = distance[centres].sort(0).values
    others = torch.ones(len(x), dtype=torch.bool)
    others[centres] = False
    if bool(((near[1] - near[0])[others] <= close * near[1][others]).any()):
        raise Undecided("clusters")
