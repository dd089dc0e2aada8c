"""What the authors' code computes, restated plainly: one prompt, attention written out, tokens really cut out.

Independent of `sparsevlm`: it shares no function with it, and is itself compared with the recorded runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rule:
    """Settings of one of the authors' variants.

    Attributes:
        layers: pruning layers.
        keep: keep list, or None for a rule by rank.
        scale, bias: keep int(rank * scale + bias), v1.0; None: keep the rank (video).
        plus: version 2.0: kernel, priority heads, original positions, no recycling.
        heads: number of priority heads.
        always_drop: at least one token is dropped at a stage.
    """

    layers: tuple[int, ...]
    keep: tuple[int, ...] | None = None
    scale: float | None = None
    bias: float = 0.0
    plus: bool = False
    heads: int = 14
    always_drop: bool = True


@dataclass
class Cut:
    """One pruning point: scores of the visual tokens that enter, the kept ones, states of the merged ones."""

    scores: Tensor
    kept: Tensor
    merged: Tensor
    positions: Tensor
    rank: int | None = None


@dataclass
class Result:
    raters: Tensor  # 0 = the first token after the visual ones
    cuts: list[Cut]
    cached: list[int]
    logits: Tensor  # [steps, vocab]
    ids: list[int]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def layer_forward(decoder, i: int, hidden: Tensor, positions: Tensor, cache: list) -> tuple[Tensor, Tensor]:
    """One Llama layer on [L, D] states; returns the new states and the attention [H, L, cached + L]."""
    layer, config = decoder.layers[i], decoder.config
    attention, width = layer.self_attn, layer.self_attn.head_dim
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).view(len(hidden), -1, width).transpose(0, 1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden, positions[None]))
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    if cache[i] is not None:
        key, value = torch.cat([cache[i][0], key], 1), torch.cat([cache[i][1], value], 1)
    cache[i] = key, value
    group = config.num_attention_heads // config.num_key_value_heads
    logits = query @ key.repeat_interleave(group, 0).transpose(1, 2) / width**0.5
    rows, columns = logits.shape[1:]
    causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    mixed = (weights @ value.repeat_interleave(group, 0)).transpose(0, 1).reshape(rows, -1)
    hidden = hidden + attention.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights


def density_peaks(x: Tensor, k: int, noise: Tensor | None = None) -> tuple[list[int], Tensor]:
    """Centres and the cluster of each of the tokens [m, D]; of equal ones the first comes first.

    `noise`: the uniform draws [m] of which the authors' code adds 1e-6 to the densities; None = none.
    """
    distance = (x[:, None] - x).square().sum(-1).sqrt() / x.shape[1] ** 0.5
    density = torch.stack([(-(row.sort().values[:k] ** 2).mean()).exp() for row in distance])
    density = (density if noise is None else density + noise * 1e-6).tolist()
    separation = []
    for i, row in enumerate(distance.tolist()):
        separation.append(min([d for d, r in zip(row, density, strict=True) if r > density[i]], default=distance.max()))
    peak = [float(s) * r for s, r in zip(separation, density, strict=True)]
    centres = sorted(range(len(x)), key=lambda i: -peak[i])[:k]
    group = distance[centres].argmin(0)
    group[centres] = torch.arange(k)
    return centres, group


def merged_tokens(x: Tensor, k: int, noise: Tensor | None = None) -> Tensor:
    """[k, D] means of the clusters of [m, D] tokens, divided by count + 1e-6 as in the authors' code."""
    _, group = density_peaks(x, k, noise)
    return torch.stack([x[group == c].sum(0) / (int((group == c).sum()) + 1e-6) for c in range(k)])


def select_raters(visual: Tensor, text: Tensor) -> Tensor:
    relevance = (visual @ text.T).softmax(1).mean(0)
    return (relevance > relevance.mean()).nonzero()[:, 0]


@torch.no_grad()
def authors_forward(
    decoder, head, embeds: Tensor, before: int, n_visual: int, rule: Rule, steps: int = 3, noise: Sequence[Tensor] = ()
) -> Result:
    """Prefill of [L, D] embeddings, visual from `before` on, and greedy decoding of `steps` tokens.

    `noise`: of each pruning point's clustering, see :func:`density_peaks`; empty = none.
    """
    hidden, positions, n = embeds, torch.arange(len(embeds)), n_visual
    visual, text = embeds[before : before + n], embeds[before + n :]
    raters = select_raters(visual, text)
    cache: list = [None] * len(decoder.layers)
    cuts: list[Cut] = []
    for i in range(len(decoder.layers)):
        hidden, attention = layer_forward(decoder, i, hidden, positions, cache)
        if i not in rule.layers:
            continue
        rows = attention[:, before + n + raters, before : before + n]
        if rule.plus:
            rows = rows / _kernel(decoder, hidden, positions)[before + n + raters, before : before + n]
            best = sorted(range(len(rows)), key=lambda h: -float(rows[h].sum()))[: rule.heads]
            rows = rows[best]
        p = rows.mean(0)
        scores = p.mean(0)
        rank = int(torch.linalg.matrix_rank(p))
        count = _count(rule, len(cuts), n, rank)
        order = scores.sort(descending=True, stable=True).indices
        kept, dropped = order[:count].sort().values, order[count:]
        tokens = hidden[before : before + n]
        merged = tokens[:0]
        if not rule.plus and len(dropped):
            pool = int(len(dropped) * 0.3) + 1
            merged = merged_tokens(tokens[dropped[:pool]], int(pool / 10) + 1, noise[len(cuts)] if noise else None)
        hidden = torch.cat([hidden[:before], tokens[kept], merged, hidden[before + n :]])
        if rule.plus:
            rest = positions[before : before + n][kept]
            positions = torch.cat([positions[:before], rest, positions[before + n :]])
        else:
            positions = torch.arange(len(hidden))
        n = len(kept) + len(merged)
        cuts.append(Cut(scores, kept, merged, positions, rank))
    cached = [keys.shape[1] for keys, _ in cache]
    logits = [head(decoder.norm(hidden[-1:]))[0]]
    ids = [int(logits[0].argmax())]
    for t in range(steps - 1):
        hidden = decoder.embed_tokens(torch.tensor([ids[-1]])).to(embeds.dtype)
        for i in range(len(cache)):  # without 2.0 each layer numbers from its own cache's length
            position = len(embeds) + t if rule.plus else cache[i][0].shape[1]
            hidden, _ = layer_forward(decoder, i, hidden, torch.tensor([position]), cache)
        logits.append(head(decoder.norm(hidden))[0])
        ids.append(int(logits[-1].argmax()))
    return Result(raters, cuts, cached, torch.stack(logits), ids)


def _count(rule: Rule, stage: int, n: int, rank: int) -> int:
    most = n - 1 if rule.always_drop else n
    if rule.keep is not None:
        return min(rule.keep[stage], most)
    if rank == n:
        return n
    return rank if rule.scale is None else min(int(rank * rule.scale + rule.bias), most)


def _kernel(decoder, hidden: Tensor, positions: Tensor) -> Tensor:
    """[L, L] products of rotated vectors of ones, over sqrt of their length."""
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden, positions[None]))
    ones = rotated(torch.ones_like(cos), cos, sin)
    return ones @ ones.T / cos.shape[-1] ** 0.5
