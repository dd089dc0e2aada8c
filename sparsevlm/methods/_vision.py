"""Base of the methods that act before the language model: in the vision tower, or on what it hands to the projector.

Budget: all pictures of a prompt share it evenly (images, or the frames of a video; where it does not divide, earlier
pictures get one more); a budget below 1 is a share of each picture. In the language model the method appears as a stage
at layer -1. Positions are renumbered, as in a shorter prompt; a picture's tokens come in the order in which the
method's authors hand them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import Schedule, explicit_schedule, in_tokens
from sparsevlm.core.packing import take
from sparsevlm.methods.base import Method
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.trace import StageRecord
from sparsevlm.runtime.vision import Encoding, Pictures, Reduced, Tower, Vision, find_towers, share


@dataclass(frozen=True)
class VisionMethod(Method):
    """Base for acting before the language model: override `reduce`, or `tower_hooks` and `encode` for the tower."""

    positions = "renumber"
    reads_text: ClassVar[bool] = False
    captures: ClassVar[bool] = False  # needs states, queries and keys of the feature layer
    after_projector: ClassVar[bool] = False  # works on what the projector makes instead of what it gets

    # ---- for subclasses to override ----------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        """Return whether anything is dropped."""
        return self.budget not in (None, "full")

    def spend(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        """Split the budget of a prompt over its pictures, which have `sizes` visual tokens; returns tokens per picture.

        A number is shared evenly; of a budget that is a share each picture gets its own share, to a token.

        Raises:
            ValueError: a budget that the method cannot express.
        """
        if isinstance(self.budget, int):
            return share(in_tokens(self.budget, sum(sizes)), sizes)
        ends = [in_tokens(self.budget, end) for end in accumulate(sizes)]
        return [end - start for start, end in pairwise([0, *ends])]

    def tower_hooks(self, vision: Vision, tower: Tower) -> list[RemovableHandle]:
        """Register further hooks on a tower and return their handles."""
        return []

    def encode(self, vision: Vision, pictures: Pictures, encoding: Encoding) -> list[Reduced]:
        """Return the rows of each group of pictures that get the same number of tokens."""
        return [self._group(pictures[group], encoding.counts[group[0]]) for group in encoding.groups]

    def _group(self, pictures: Pictures, count: int) -> Reduced:
        """Return the rows of one group, by `reduce` if any token goes."""
        n, tokens = pictures.features.shape[:2]
        if count in (0, tokens):
            origin = torch.arange(count, device=pictures.features.device).expand(n, -1)
            return Reduced(pictures.features[:, :count], origin)
        return self.reduce(pictures, count)

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        """Reduce each picture to `count` rows; 0 < count < number of its visual tokens."""
        raise NotImplementedError

    # ---- called by the runtime -------------------------------------------------------------------------------------
    def check(self, family: Family) -> None:
        find_towers(family, self.name)

    def attach(self, family: Family) -> Vision | None:
        return Vision(self, family) if self.active else None

    def hooks(self, attached: Vision | None) -> list[RemovableHandle]:
        return [] if attached is None else attached.handles()

    def check_call(self, attached: Vision | None, arguments: dict[str, Any]) -> None:
        if attached is not None:
            attached.check_call(arguments)

    def announce(self, attached: Vision | None, input_ids: Tensor) -> None:
        if attached is not None:
            attached.announce(input_ids)

    def forget(self, attached: Vision | None) -> None:
        if attached is not None:
            attached.forget()

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        """Return the schedule for a prompt of one picture."""
        return self.plan_pictures(n_visual, n_layers, n_visual)

    def schedule(self, n_visual: int, n_layers: int, attached: Vision | None) -> Schedule:
        return self.plan_pictures(n_visual, n_layers, n_visual if attached is None else attached.tokens)

    def plan_pictures(self, n_visual: int, n_layers: int, size: int) -> Schedule:
        """Return the schedule for a prompt whose pictures have `size` visual tokens each."""
        if not self.active:
            return super().plan(n_visual, n_layers)
        keep = sum(self.spend([size] * max(1, round(n_visual / size)), n_layers))
        return explicit_schedule(n_visual, n_layers, (-1,), (keep,))

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        vision: Vision | None = prefill.attached
        if vision is None:
            return
        vision.announced, vision.pictures = False, None
        for b, (n, schedule) in enumerate(zip(prefill.n_visual, prefill.schedules, strict=True)):
            keep = schedule.keep[0] if n and schedule.keep else n
            if keep < n and keep != _made(vision, prefill.batch, b, n):
                raise ValueError(
                    f"method {self.name!r} acts while pictures are encoded, and these were encoded without it or "
                    "without their prompt. Pass input_ids and pixel values together, inside the `with` block"
                )

    def score(self, stage: Stage) -> Tensor:
        """Score rows that were filled with 1, the zeros of dropped tokens with 0."""
        return (take(stage.hidden, stage.visual_index) != 0).any(-1).float()

    def annotate(self, record: StageRecord, prefill: Prefill) -> None:
        """Record in the trace which visual tokens the rows are, instead of which slots they took."""
        encodings = [] if prefill.attached is None else list(prefill.attached.last.values())
        if not encodings or any(encoding.prompts is None for encoding in encodings):
            return
        samples = []
        for b in range(prefill.batch):
            prompts = [(encoding, b * len(encoding.prompts) // prefill.batch) for encoding in encodings]
            samples.append([(encoding, prompt) for encoding, prompt in prompts if encoding.prompts[prompt]])
        default = record._details
        assert default is not None  # nobody has looked yet
        if record.layer >= 0:
            record._details = partial(_later_details, default, samples)
            return
        record.recycled = [sum(e.extra(p) for e, p in sample) for sample in samples]
        record._details = partial(_details, default, samples)


def patches(pictures: Pictures) -> Tensor:
    """Return the features [n, P, d] of the patches, without a CLS token that the model takes, too."""
    return pictures.features[:, int(pictures.tower.cls) :]


def selected(pictures: Pictures, chosen: Tensor, scores: Tensor | None = None) -> Reduced:
    """Hand on the patches `chosen` [n, T], in their order, as they are; `scores` [n, P] are for the trace."""
    cls = int(pictures.tower.cls)
    origin = chosen.sort(1).values + cls
    if scores is not None and cls:
        scores = F.pad(scores, (1, 0), value=float("-inf"))
    return Reduced(take(pictures.features, origin), origin, scores)


def _made(vision: Vision, batch: int, b: int, n_visual: int) -> int | None:
    """Count the tokens that were made of the pictures of sample b; None if that is not known."""
    total = 0
    for encoding in vision.last.values():
        prompts = encoding.prompts
        if prompts is None and n_visual > encoding.tower.tokens:
            return None
        total += encoding.counts[0] if prompts is None else sum(encoding.of_prompt(b * len(prompts) // batch))
    return total


Sample = list[tuple[Encoding, int]]  # what was made of a prompt's images and of its video, and its number there
Details = tuple[list[Any], list[Any], list[Any]]  # scores, kept and origin per sample, as in `StageRecord`


def _details(default: Callable[[], Details], samples: list[Sample]) -> Details:
    """Return the details of a stage at the input, of what was made of the pictures."""
    scores, kept, origin = default()
    for b, sample in enumerate(samples):
        if not sample:
            continue
        made = [(*e.trace(p), _places(e, p)) for e, p in sample]
        kept[b] = origin[b] = torch.cat([places[k] for _, k, places in made]).sort().values
        known = [s for s, _, _ in made if s is not None]
        order = torch.cat([places for *_, places in made]).argsort()
        scores[b] = torch.cat(known)[order.to(known[0].device)] if len(known) == len(made) else None
    return scores, kept, origin


def _later_details(default: Callable[[], Details], samples: list[Sample]) -> Details:
    """Return the same for a stage inside the language model, which knows tokens by their slots."""
    scores, kept, origin = default()
    for b, sample in enumerate(samples):
        if not sample:
            continue
        tokens = torch.full((sum(len(_places(e, p)) for e, p in sample),), -1)
        for e, p in sample:
            places, own = _places(e, p), e.origins(p)
            tokens[places] = torch.where(own < 0, -1, places[own])
        origin[b] = tokens[origin[b]]
    return scores, kept, origin


def _places(e: Encoding, p: int) -> Tensor:
    """[n] int64: the visual tokens of prompt p that were encoded there, among all of its visual tokens."""
    if e.places is not None:
        return e.places[p]
    assert e.prompts is not None  # else a tower's tokens have no prompt
    return torch.arange(e.prompts[p] * e.tower.tokens)


def slots(prefill: Prefill, value: Callable[[Reduced, int], Tensor], out: Tensor, among_rows: bool = False) -> Tensor:
    """Return what is known of the rows of each picture, where in the call these were filled in.

    Args:
        value: from what was made of a group of pictures, and their visual tokens, to [n, T]: one value per row.
        out: [B, L] what all other rows have.
        among_rows: values are visual tokens of their picture and become the rows of the call where these were.
    """
    vision: Vision = prefill.attached
    out = out.clone()
    places = torch.from_numpy(prefill.prompt.index(max(prefill.prompt.counts))).to(out.device)
    for b in range(prefill.batch):
        for encoding in vision.last.values():
            prompts = encoding.prompts
            if prompts is None:  # one picture per prompt
                prompts = [1] * len(encoding.counts)
            p = b * len(prompts) // prefill.batch
            first, mine = sum(prompts[:p]), places[b][_places_of(encoding, prompts, p).to(out.device)]
            for k in range(prompts[p]):
                for group, made in zip(encoding.groups, encoding.reduced, strict=True):
                    if first + k in group:
                        rows = mine[k * encoding.tower.tokens : (k + 1) * encoding.tower.tokens]
                        new = value(made, encoding.tower.tokens)[group.index(first + k)].to(out.device)
                        out[b, rows[: len(new)]] = rows[new] if among_rows else new.to(out.dtype)
    return out


def _places_of(e: Encoding, prompts: list[int], p: int) -> Tensor:
    return torch.arange(prompts[p] * e.tower.tokens) if e.places is None else e.places[p]
