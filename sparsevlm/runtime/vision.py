"""Acting before the language model: hooks on CLIP vision towers and on the projector.

The projector gets T rows instead of N; what it makes of them is put into the first of the N slots that the prompt
reserves for a picture, zeros into the others. A dropped token *is* a row of zeros, so nothing has to be remembered
between encoding and the language model, whoever does either (generate() encodes before it expands beams).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sparsevlm.runtime.families import Family
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.towers import Tower, feature_choice, find_towers


def share(budget: int, sizes: Sequence[int]) -> list[int]:
    """Spend a budget evenly on pictures of the given sizes; earlier ones get what is left over, as far as it fits."""
    counts, rest = [], budget
    for i, size in enumerate(sizes):
        counts.append(min(-(-rest // (len(sizes) - i)), size))
        rest -= counts[-1]
    for i, size in enumerate(sizes):
        more = min(rest, size - counts[i])
        counts[i] += more
        rest -= more
    return counts


@dataclass
class Pictures:
    """What a method sees of n pictures that shall get the same number of tokens.

    Attributes:
        tower: where they come from.
        features: [n, N, d] what the projector gets, or has made.
        states: [n, 1 + P, d] output of the feature layer: CLS and all patches; None if not asked for.
        queries, keys: [n, 1 + P, d] raw projections of that layer; None if not asked for.
        relevance: [n, N] what a method found about the visual tokens of all pictures together.
        more: [n, ...] what else a method captured in the tower, or found, by name.
    """

    tower: Tower
    features: Tensor
    states: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    relevance: Tensor | None = None
    more: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: list[int]) -> Pictures:
        if rows == list(range(self.features.shape[0])):
            return self
        parts = ("features", "states", "queries", "keys", "relevance")
        more = {name: value[rows] for name, value in self.more.items()}
        return replace(self, more=more, **{p: getattr(self, p)[rows] for p in parts if getattr(self, p) is not None})

    def cls_attention(self) -> Tensor:
        """[n, H, P] float32: what CLS pays each patch, of a softmax over all tokens; only its row is computed."""
        attention = self.tower.blocks[-1].self_attn
        return cls_row(attention, self.queries, self.keys)[..., 1:]

    def mean_keys(self) -> Tensor:
        """[n, 1 + P, d / H] keys averaged over heads."""
        return mean_heads(self.keys, self.tower.blocks[-1].self_attn)


def cls_row(attention: Network, queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """[n, H, t] softmaxed attention, in at least float32, of token 0 to all of [n, t, d] raw projections."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    q, k = (x.to(dtype).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (queries[:, :1], keys))
    logits = (q @ k.transpose(2, 3))[:, :, 0] * attention.scale
    return (logits if bias is None else logits + bias[:, None]).softmax(-1)


def attention_logits(attention: Network, queries: Tensor, keys: Tensor) -> Tensor:
    """[n, H, t, t] attention before the softmax, in at least float32; for methods that need all of it."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    q, k = (x.to(dtype).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (queries, keys))
    return q @ k.transpose(2, 3) * attention.scale


def mean_heads(x: Tensor, attention: Network) -> Tensor:
    """[n, t, d / H] mean over the heads of [n, t, d] raw projections, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.unflatten(-1, (attention.num_heads, -1)).mean(2)


@dataclass
class Reduced:
    """What a method makes of n pictures.

    Attributes:
        rows: [n, T, d] in the order in which the language model shall see them; None once they are handed on.
        origin: [n, T] int64, the visual token that each row is, or is the centre of; -1 = none.
        scores: [n, N] float scores of the visual tokens, None = the method has none.
        extra: number of rows whose origin is -1, of each picture; one number where all have the same.
        sizes: [n, T] int64, visual tokens that were merged into each row; None = the method does not say.
    """

    rows: Tensor | None
    origin: Tensor
    scores: Tensor | None = None
    extra: int | list[int] = 0
    sizes: Tensor | None = None


@dataclass
class Encoding:
    """One call of a tower: n pictures, the tokens each shall get, and what was made of them.

    Attributes:
        counts: tokens per picture.
        prompts: number of pictures of each prompt, None = unknown.
        places: per prompt [n] int64, which of all its visual tokens those of this kind are; None = all.
        groups: pictures by equal counts; empty if no picture loses anything.
        reduced: per group.
    """

    tower: Tower
    counts: list[int]
    prompts: list[int] | None
    places: list[Tensor] | None = None
    groups: list[list[int]] = field(default_factory=list)
    reduced: list[Reduced] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(count < self.tower.tokens for count in self.counts):
            self.groups = [[i for i, c in enumerate(self.counts) if c == count] for count in sorted({*self.counts})]

    def of_prompt(self, p: int) -> list[int]:
        """Tokens of each picture of prompt p."""
        first = sum(self.prompts[:p])
        return self.counts[first : first + self.prompts[p]]

    def extra(self, p: int) -> int:
        """Tokens of prompt p that are none of its visual tokens (merged ones, CLS where the model does not use it)."""
        first, last = sum(self.prompts[:p]), sum(self.prompts[: p + 1])
        return sum(
            made.extra if isinstance(made.extra, int) else made.extra[j]
            for group, made in zip(self.groups, self.reduced, strict=True)
            for j, i in enumerate(group)
            if first <= i < last
        )

    def origins(self, p: int) -> Tensor:
        """[V] which visual token of prompt p the row in each of its slots is; -1 = none."""
        tokens, first = self.tower.tokens, sum(self.prompts[:p])
        out = torch.full((self.prompts[p] * tokens,), -1)
        for k in range(self.prompts[p]):
            for group, made in zip(self.groups, self.reduced, strict=True):
                if first + k in group:
                    origin = made.origin[group.index(first + k)].cpu()
                    out[k * tokens : k * tokens + len(origin)] = torch.where(origin < 0, -1, origin + k * tokens)
        return out if self.groups else torch.arange(len(out))

    def trace(self, p: int) -> tuple[Tensor | None, Tensor]:
        """Scores [V] of the visual tokens of prompt p, and the kept ones among them [K] int64, ascending."""
        first, scores, kept = sum(self.prompts[:p]), [], []
        for k in range(self.prompts[p]):
            group = next((g for g in self.groups if first + k in g), [])
            if not group:
                kept.append(torch.arange(self.tower.tokens) + k * self.tower.tokens)
                continue
            made, j = self.reduced[self.groups.index(group)], group.index(first + k)
            origin = made.origin[j].cpu()
            kept.append(origin[origin >= 0].sort().values + k * self.tower.tokens)
            scores.append(None if made.scores is None else made.scores[j])
        known = bool(scores) and all(s is not None for s in scores) and len(scores) == self.prompts[p]
        return torch.cat(scores) if known else None, torch.cat(kept)


class Vision:
    """The hooks of one method on the towers and the projector of one model.

    Attributes:
        tokens: visual tokens of one picture.
        last: what was made of the pictures of the last prompts, by kind.
        captured: of the call being made: fields of `Pictures`.
        scratch: what the method remembers while it is installed.
    """

    def __init__(self, method, family: Family):
        self.method, self.family = method, family
        self.towers = find_towers(family, method.name)
        self.choice = feature_choice(family.outer.config)
        self.tokens = max(t.tokens for t in self.towers)
        self.pictures: list[dict[str, int]] | None = None  # of each prompt, by kind, as announced
        self.announced = False
        self.places: dict[str, list[Tensor]] = {}  # by kind, as `Encoding.places`; empty where there is one kind only
        self.last: dict[str, Encoding] = {}
        self.encoding: Encoding | None = None
        self.captured: dict[str, Tensor] = {}
        self.scratch: dict[str, Any] = {}

    def handles(self) -> list[RemovableHandle]:
        out = []
        for tower in self.towers:
            out.append(tower.module.register_forward_pre_hook(partial(self._enter, tower), with_kwargs=True))
            if self.method.captures:
                layer = tower.blocks[-1]
                watched = {"states": layer, "queries": layer.self_attn.q_proj, "keys": layer.self_attn.k_proj}
                out += [module.register_forward_hook(self.keeper(name)) for name, module in watched.items()]
            out += self.method.tower_hooks(self, tower)
        projector = self.family.outer.multi_modal_projector
        out.append(projector.register_forward_pre_hook(self._before_projector))
        out.append(projector.register_forward_hook(self._after_projector))
        return out

    def keeper(self, name: str):
        """A forward hook that makes the output the field `name` of `Pictures`, or an entry of `more`."""

        def keep(module: nn.Module, args: tuple, out) -> None:
            self.captured[name] = out[0] if isinstance(out, tuple) else out

        return keep

    # ---- how many tokens each picture gets -------------------------------------------------------------------------
    def forget(self) -> None:
        """Take pictures for nobody's until others are announced."""
        self.announced, self.pictures, self.encoding, self.captured = False, None, None, {}

    def announce(self, ids: Tensor) -> None:
        """Count the pictures of each prompt of [B, L] ids. Waits for the device unless there is nothing to find out."""
        config, kinds = self.family.outer.config, {t.kind: t for t in self.towers}
        self.announced, self.pictures, self.last, self.places = True, None, {}, {}
        if ids.device.type == "meta" or (ids.shape[0] == 1 and len(kinds) == 1):
            return  # all pictures belong to the one prompt
        marks = torch.stack([ids == getattr(config, f"{kind}_token_id") for kind in kinds])
        if len(kinds) > 1:
            marks = marks.cpu()
            ranks = marks.any(0).cumsum(1) - 1
            for kind, mark in zip(kinds, marks, strict=True):
                self.places[kind] = [rank[own] for rank, own in zip(ranks, mark, strict=True)]
        rows = marks.sum(2).T.tolist()
        sizes = [t.tokens for t in kinds.values()]
        self.pictures = [
            dict(zip(kinds, (c // s for c, s in zip(row, sizes, strict=True)), strict=True)) for row in rows
        ]

    def _counts(self, tower: Tower, n: int) -> tuple[list[int], list[int] | None]:
        """Tokens of each of n pictures, and the pictures of each prompt."""
        if not self.announced:  # somebody encodes by himself: every picture is taken for a prompt of its own
            return self.method.spend([tower.tokens], self.family.n_layers) * n, None
        prompts = self.pictures or [{tower.kind: n}]
        sizes = {t.kind: t.tokens for t in self.towers}
        counts = []
        for prompt in prompts:
            kinds = [kind for kind in sizes for _ in range(prompt.get(kind, 0))]
            spent = self.method.spend([sizes[kind] for kind in kinds], self.family.n_layers) if kinds else []
            counts += [c for c, kind in zip(spent, kinds, strict=True) if kind == tower.kind]
        if len(counts) != n:
            raise ValueError(f"{n} pictures ({tower.kind}) were given, the prompts have room for {len(counts)}")
        return counts, [p.get(tower.kind, 0) for p in prompts]

    def check_call(self, arguments: dict) -> None:
        """Refuse a call that reads other features of the tower than those that the method was installed for.

        Raises:
            ValueError: another layer, or other tokens of it.
        """
        asked = feature_choice(self.family.outer.config, arguments)
        if asked != self.choice:
            raise ValueError(
                f"method {self.method.name!r} was installed for vision_feature_layer={self.choice[0]}, "
                f"vision_feature_select_strategy={self.choice[1]!r}, and the call asks for {asked[0]}, {asked[1]!r}; "
                "set these in model.config before the `with` block"
            )

    # ---- hooks -----------------------------------------------------------------------------------------------------
    def _enter(self, tower: Tower, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        layer = kwargs.get("output_hidden_states")  # the one that is read, where only that is kept
        self.check_call({} if isinstance(layer, bool) else {"vision_feature_layer": layer})
        self.captured = {}
        counts, prompts = self._counts(tower, pixels.shape[0])
        self.encoding = self.last[tower.kind] = Encoding(
            tower, counts, prompts, self.places.get(tower.kind) if prompts is not None else None
        )

    def _make(self, features: Tensor) -> Encoding:
        e = self.encoding
        known = {name: value for name, value in self.captured.items() if name in Pictures.__dataclass_fields__}
        more = {name: value for name, value in self.captured.items() if name not in known}
        pictures = Pictures(e.tower, features, more=more, **known)
        e.reduced = self.method.encode(self, pictures, e)
        return e

    def _before_projector(self, module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        if self.encoding is None or not self.encoding.groups or self.method.after_projector:
            return None
        with part("pictures"):
            return (torch.cat([made.rows.flatten(0, 1) for made in self._make(args[0]).reduced]),)

    def _after_projector(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if self.encoding is None or not self.encoding.groups:
            self.encoding = None
            return None
        with part("pictures"):
            return self._projected(out)

    def _projected(self, out: Tensor) -> Tensor:
        """Rows of all pictures in full length: [pictures, N, D], zeros behind those that each one got."""
        if self.method.after_projector:
            out = torch.cat([made.rows.flatten(0, 1) for made in self._make(out).reduced])
        e, self.encoding, self.captured = self.encoding, None, {}
        for made in e.reduced:
            made.rows = None  # a trace may keep the rest for long
        order = [i for group in e.groups for i in group]
        parts = out.split([e.counts[i] for i in order])
        parts = [F.pad(rows, (0, 0, 0, e.tower.tokens - rows.shape[0])) for rows in parts]
        return torch.stack([parts[order.index(i)] for i in range(len(order))])
