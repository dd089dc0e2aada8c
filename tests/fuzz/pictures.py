"""Methods that act before the language model: how many tokens each picture gets, and which rows these are."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from sparsevlm.methods import method_class, names
from sparsevlm.methods._vision import VisionMethod
from tests.fuzz.case import FRAMES, Case, Turn
from tests.fuzz.reference import Mismatch, tolerance

VISION = tuple(name for name in names() if issubclass(method_class(name), VisionMethod))
SELECTING = ("anchorprune", "cdpruner", "divprune", "fastervlm", "mmtok", "scope", "vispruner")  # tokens as they are


def sizes(case: Case, parts: tuple) -> list[tuple[int, int]]:
    """First slot and tokens of each picture or frame of a prompt, images before videos as the budget counts them."""
    images, frames, at = [], [], 0
    for part in parts:
        if part == "I":
            images.append((at, case.shape.image_tokens))
        elif part == "V":
            per = case.shape.grid**2 + 1
            frames += [(at + i * per, per) for i in range(FRAMES)]
        at += case.shape.tokens(part)
    return images + frames


def spent(case: Case, parts: tuple, total: int) -> list[int] | None:
    """Tokens that each of `sizes` gets, `total` being those that the trace says are left; None = the method is idle."""
    room, o = [n for _, n in sizes(case, parts)], case.options
    budget = o.get("budget")
    if case.method == "downsample" and o.get("side") is not None:
        return [o["side"] ** 2] * len(room)
    if case.method == "visionzip" and o.get("dominant") is not None:
        return [o["dominant"] + o["contextual"]] * len(room)
    if case.method == "vscan" and o.get("keep") is not None:
        budget = o["keep"][0]
    if case.method == "aim" and o.get("merge_to") is not None:
        return [o["merge_to"]] * len(room)
    if budget in (None, "full"):
        return None
    if budget >= sum(room):  # clamped to what there is
        return room
    if case.method == "downsample":
        return [isqrt(budget // len(room)) ** 2] * len(room)
    left = total if case.method in ("aim", "tops", "vscan") else budget
    counts = [0] * len(room)
    while left:  # round by round, earlier pictures first
        for i, n in enumerate(room):
            if left and counts[i] < n:
                counts[i] += 1
                left -= 1
    return counts


def check_rows(case: Case, turn: Turn, b: int, parts: tuple, entered: Tensor, kept: list[int]) -> list[int]:
    """Slots that are filled, as positions among the prompt's visual tokens, in order.

    Args:
        entered: [L, D] what the text model was given for this prompt.
        kept: what the trace says of the stage before the language model.

    Raises:
        Mismatch: slots filled that should be empty, or the other way round; rows that are not the kept tokens.
    """
    visual = [i for i, row in enumerate(turn.ids[b]) if row >= 98]
    counts = spent(case, parts, len(kept))
    if counts is None:
        return list(range(len(visual)))
    filled, where = [], {row: i for i, row in enumerate(visual)}
    for (first, size), count in zip(sizes(case, parts), counts, strict=True):
        slots = [where[first + i] for i in range(size)]
        filled += slots[:count]
        given = entered[[visual[s] for s in slots]]
        if bool((given[:count] == 0).all(1).any()) or bool(given[count:].any()):
            raise Mismatch(f"{count} of {size} slots of a picture should be filled: {given.abs().sum(1).tolist()}")
        if case.method in SELECTING:
            chosen = [k for k in kept if slots[0] <= k <= slots[-1]]
            want = turn.embeds[b][[visual[k] for k in chosen]]
            if len(chosen) != count or not torch.allclose(given[:count], want, rtol=0, atol=_close(case, want)):
                raise Mismatch(f"the rows handed on are not the kept tokens {chosen}")
    return sorted(filled)


def _close(case: Case, want: Tensor) -> float:
    return 20 * tolerance(case.torch_dtype) * float(want.abs().max()) if len(want) else 0.0
