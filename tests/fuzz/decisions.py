"""What the methods that act in the language model should have decided: their rules, restated for one prompt.

Each function looks at the masked run before a stage is applied, and raises Mismatch where the trace's scores, raters or
kept tokens are not those of the rule. Decisions in which two tokens tie to rounding are left to the library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.fuzz.case import Case
from tests.fuzz.reference import Conversation, Cut, Mismatch, Part, Undecided, tolerance
from tests.restatement import rotated


def attention(c: Conversation, layer: int, hidden: Tensor, queries: list[int]) -> Tensor:
    """[H, queries, T] softmaxed attention of rows in a layer that `hidden` enters, to all rows it may see."""
    module = c.decoder.layers[layer]
    a = module.self_attn
    normed = module.input_layernorm(hidden)
    cos, sin = (t[0] for t in c.decoder.rotary_emb(hidden[None], c.positions[None]))

    def heads(project, x: Tensor, norm: str) -> Tensor:
        y = project(x).view(len(x), -1, a.head_dim)
        return (getattr(a, norm)(y) if hasattr(a, norm) else y).transpose(0, 1)

    q = rotated(heads(a.q_proj, normed[queries], "q_norm"), cos[queries], sin[queries])
    k = rotated(heads(a.k_proj, normed, "k_norm"), cos, sin)
    logits = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * a.scaling
    return logits.masked_fill(~(c.seen & c.near(layer))[queries], float("-inf")).softmax(-1)


def underflow(dtype: torch.dtype) -> float:
    """What is left of probabilities this small depends on the order of operations."""
    return {torch.float64: 1e-100, torch.float32: 1e-12}[dtype]


def check_scores(got: Tensor | None, want: Tensor, cut: Cut, dtype: torch.dtype) -> None:
    """The trace's scores are those of the rule, to rounding."""
    if got is None:
        raise Mismatch(f"layer {cut.layer}: {cut.tokens_in - len(cut.kept)} tokens dropped without scores")
    close = {torch.float64: 1e-5, torch.float32: 2e-3}[dtype]
    worst = float((got.double() - want.double()).abs().max())
    if not worst <= close * float(want.abs().max()) + underflow(dtype):
        raise Mismatch(f"layer {cut.layer}: scores differ by {worst:.3g}: {got.tolist()}, should be {want.tolist()}")


def check_kept(want: Tensor, cut: Cut, dtype: torch.dtype) -> None:
    """No dropped token has a clearly higher score than a kept one."""
    dropped = [i for i in range(cut.tokens_in) if i not in set(cut.kept)]
    if cut.kept and dropped and float(want[cut.kept].min()) < float(want[dropped].max()):
        gap = float(want[dropped].max() - want[cut.kept].min())
        if gap > 100 * tolerance(dtype) * float(want.abs().max()) + underflow(dtype):
            raise Mismatch(f"layer {cut.layer}: kept {cut.kept} of scores {want.tolist()}")


# ---- rules -----------------------------------------------------------------------------------------------------------
def fastv(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor:
    return attention(c, cut.layer, c.entered, [part.end - 1])[:, 0, part.visual].mean(0)


def pyramiddrop(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor:
    return attention(c, cut.layer + 1, c.hidden, [part.end - 1])[:, 0, part.visual].mean(0)


def raters(c: Conversation, part: Part, rule: str | int, embeds: Tensor, dtype: torch.dtype) -> list[int]:
    """Rows of the raters; those of the trace where rounding decides."""
    text = part.text
    if rule in ("all", "tokens"):
        return text
    if rule == "last":
        return text[-1:]
    visual, words = embeds[part.entered], embeds[text]
    if rule == "centred":
        visual = visual - visual.mean(0)
    relevance = (visual @ words.T).softmax(1).mean(0)
    close = 100 * tolerance(dtype) * float(relevance.max())
    if isinstance(rule, int):
        order = sorted(range(len(text)), key=lambda i: -float(relevance[i]))
        if rule < len(text) and float(relevance[order[rule - 1]] - relevance[order[rule]]) <= close:
            raise Undecided("raters")
        return sorted(text[i] for i in order[:rule])
    above = relevance - relevance.mean()
    if len(text) > 1 and bool((above.abs() <= close).any()):
        raise Undecided("raters")
    chosen = [t for t, x in zip(text, above.tolist(), strict=True) if x > 0]
    return chosen if len(text) > 1 and chosen else text


def rated(case: Case, c: Conversation, part: Part, cut: Cut) -> tuple[Tensor, list[int]]:
    """[H, raters, V] attention, and the raters, which must be those of the trace."""
    want = raters(c, part, case.options.get("raters", "paper"), c.embeds, case.torch_dtype)
    if part.raters != want:
        raise Mismatch(f"raters {part.raters}, should be {want}")
    layer, hidden = (0, c.hidden) if cut.layer < 0 else (cut.layer, c.entered)
    return attention(c, layer, hidden, want)[:, :, part.visual], want


def sparsevlm(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor:
    rows, _ = rated(case, c, part, cut)
    if case.options.get("raters") != "tokens":
        return rows.mean((0, 1))
    layer, hidden = (0, c.hidden) if cut.layer < 0 else (cut.layer, c.entered)
    visual = attention(c, layer, hidden, part.visual)[:, :, part.visual]
    return rows.mean(0).sum(0) + visual.mean(0).sum(0)


def sparsevlm_rank(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor:
    rows, _ = rated(case, c, part, cut)
    p, n = rows.mean(0), len(part.visual)
    values = torch.linalg.svdvals(p)
    bound = float(values.max()) * max(p.shape) * torch.finfo(p.dtype).eps
    if any(bound / 10 < v < bound * 10 for v in values.tolist()):
        raise Undecided("rank")
    rank, o = int((values > bound).sum()), case.options
    rule = o.get("rule", "paper")
    if rule == "paper":
        keep = max(1, n - max(0, int(o.get("lam", 0.5) * (n - rank))))
    elif rank == n:
        keep = n
    elif rule == "video":
        keep = max(1, rank)
    else:
        keep = max(1, min(int(rank * o.get("scale", 13.5) + o.get("bias", 0.0)), n - 1 if n > 1 else n))
    if len(cut.kept) != keep:
        raise Mismatch(f"layer {cut.layer}: {len(cut.kept)} of {n} tokens kept at rank {rank}, should be {keep}")
    return rows.mean((0, 1))


def sparsevlm_plus(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor:
    rows, who = rated(case, c, part, cut)
    rows, o = rows.double(), case.options
    if o.get("kernel", True):
        cos, sin = (t[0].double() for t in c.decoder.rotary_emb(c.hidden[None], c.positions[None]))
        ones = rotated(torch.ones_like(cos), cos, sin)
        kernel = ones[who] @ ones[part.visual].T / cos.shape[-1] ** 0.5
        floor = o.get("kernel_floor")
        if floor is None and float(kernel.abs().min()) < 0.02:
            raise Undecided("a kernel near zero")
        rows = rows / (kernel if floor is None else kernel.clamp(min=floor))
    heads = o.get("heads", 14 / 32)
    count = int(heads) if heads > 1 else max(1, int(heads * len(rows) + 0.5))
    looks = rows.sum((1, 2))
    order = looks.argsort(descending=True)
    if count < len(rows) and float(looks[order[count - 1]] - looks[order[count]]) <= 1e-4 * float(looks.abs().max()):
        raise Undecided("heads")
    return rows[order[:count]].mean((0, 1))


def ficoco_l(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor:
    """Besides scoring, folds the discarded tokens into the kept ones."""
    o = case.options
    beta, gamma, epsilon = o.get("beta", 0.6), o.get("gamma", 0.6), o.get("epsilon", 0.998)
    a = attention(c, cut.layer, c.entered, part.visual + part.text).mean(0)[:, part.visual]
    n = len(part.visual)
    visual, text = a[:n], a[n:]
    redundancy = beta * visual.mean(1) - (1 - beta) * text.mean(0)
    dropped = [i for i in range(n) if i not in set(cut.kept)]
    tokens = c.hidden[part.visual].clone()
    total, weight = tokens.clone(), torch.ones(n, dtype=tokens.dtype)
    for i in dropped:
        correlation = gamma * visual[i, cut.kept] + (1 - gamma) * (text[:, i, None] * text[:, cut.kept]).sum(0)
        ranked = correlation.sort().values
        at = math.ceil(epsilon * (len(ranked) - 1))
        if at and 0 < float(ranked[at] - ranked[at - 1]) <= 100 * tolerance(case.torch_dtype) * float(ranked[at]):
            raise Undecided("targets")
        chosen = correlation >= ranked[at]
        if float(correlation[chosen].sum()) < 1e-250 or (case.dtype == "float32" and float(ranked[at]) < 1e-30):
            raise Undecided("no correlation")
        for j, share in zip(cut.kept, (correlation * chosen / correlation[chosen].sum()).tolist(), strict=True):
            total[j] += share * tokens[i]
            weight[j] += share
    c.hidden = c.hidden.clone()
    c.hidden[[part.visual[i] for i in cut.kept]] = (total / weight[:, None])[cut.kept]
    return -redundancy


def dart(case: Case, c: Conversation, part: Part, cut: Cut) -> None:
    """Kept tokens only; scores are the order of choice."""
    module = c.decoder.layers[cut.layer]
    a = module.self_attn
    cos, sin = (t[0] for t in c.decoder.rotary_emb(c.entered[None], c.positions[None]))
    k = a.k_proj(module.input_layernorm(c.entered)).view(len(cos), -1, a.head_dim)
    k = rotated((a.k_norm(k) if hasattr(a, "k_norm") else k).transpose(0, 1), cos, sin)
    size = k.double().abs().sum((0, 2))

    def largest(rows: list[int], count: int) -> list[int]:
        order = sorted(range(len(rows)), key=lambda i: -float(size[rows[i]]))
        if 0 < count < len(rows) and float(size[rows[order[count - 1]]] - size[rows[order[count]]]) <= 1e-5:
            raise Undecided("pivots")
        return sorted(order[:count])

    keep = len(cut.kept)
    first = largest(part.visual, min(case.options.get("visual_pivots", 4), keep))
    second = largest(part.text, min(case.options.get("text_pivots", 4), len(part.text)))
    pivots = [part.visual[i] for i in first] + [part.text[i] for i in second]
    unit = F.normalize(c.decoder.norm(c.hidden).double(), dim=-1)
    chosen, free = list(first), [i for i in range(len(part.visual)) if i not in first]
    for j, pivot in enumerate(pivots):
        share = (keep - len(first)) // len(pivots) + (j < (keep - len(first)) % len(pivots))
        alike = {i: float(unit[part.visual[i]] @ unit[pivot]) for i in free}
        order = sorted(free, key=alike.get)
        if 0 < share < len(order) and alike[order[share]] - alike[order[share - 1]] <= 1e-5:
            raise Undecided("least similar")
        chosen += order[:share]
        free = [i for i in free if i not in order[:share]]
    if sorted(chosen) != cut.kept:
        raise Mismatch(f"layer {cut.layer}: kept {cut.kept}, should be {sorted(chosen)}")


def aim(case: Case, c: Conversation, part: Part, cut: Cut) -> Tensor | None:
    """Importance by steps of sharpened attention among the rows of the prompt.

    Of start="all" the first stage only: later ones depend on rows that were dropped, which go on beside the others.
    """
    if case.options.get("start", "all") == "all" and cut.layer > min(x.layer for x in part.cuts if x.layer >= 0):
        return None
    rows = [i for i in c.alive.nonzero()[:, 0].tolist() if part.start <= i < part.end]
    flow = attention(c, cut.layer, c.entered, rows)[:, :, rows].double()
    flow = (flow.log() / case.options.get("temperature", 0.1)).softmax(-1)
    p = torch.full((len(flow), 1, len(rows)), 1 / len(rows), dtype=flow.dtype)
    for _ in range(case.options.get("steps", 5)):
        p = p @ flow
    return p[:, 0].square().mean(0).sqrt()[[rows.index(i) for i in part.visual]]


RULES = {f.__name__: f for f in (fastv, pyramiddrop, sparsevlm, sparsevlm_rank, sparsevlm_plus, ficoco_l, dart, aim)}


def decider(case: Case):
    """Checks of a stage's decision for `Contract.decide`; None where the rule is not restated (draws, bfloat16)."""
    rule = RULES.get(case.method)
    if rule is None or case.dtype == "bfloat16":
        return None

    def decide(c: Conversation, part: Part, cut: Cut) -> None:
        later = part is not c.parts[0]
        if cut.layer < 0 and case.method == "aim":
            return
        if later and case.method != "ficoco_l":  # positions and keys of a later turn: mechanics only
            return
        want = rule(case, c, part, cut)
        if want is not None:
            check_scores(cut.scores, want, cut, case.torch_dtype)
            check_kept(want, cut, case.torch_dtype)

    return decide
