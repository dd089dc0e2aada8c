"""Stage 1: patches learn to name what they show - vision tower, projector and word embeddings, a miniature CLIP."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from sparsevlm.mini.model import embed_patches
from sparsevlm.mini.scenes import GRID, NO_CLASS, NO_COLOR
from sparsevlm.mini.training.batches import averages, objects_of
from sparsevlm.mini.vocabulary import CLASSES, COLORS, DIGITS, WORD_ID, WORDS

BACKGROUND_WEIGHT = 0.12
_CLASS_IDS = [WORD_ID[word] for word in CLASSES]
_COLOR_IDS = [WORD_ID[word] for word in COLORS]
_OTHER_IDS = [i for i in range(1, len(WORDS)) if i not in {*_CLASS_IDS, *_COLOR_IDS}]


class Alignment:
    """Every patch is classified by its dot products with the words' embeddings: class (or "empty"), colour (or "none").

    Trains tower, projector and embeddings, with two helpers that are dropped afterwards: the scale of the dot products
    and a linear read-out of the patch's place.
    """

    def __init__(self, model: LlavaForConditionalGeneration, precision: torch.dtype = torch.bfloat16):
        self.model, self.precision = model, precision
        self.embeddings = model.model.language_model.embed_tokens.weight
        device, width = self.embeddings.device, self.embeddings.shape[1]
        self.helpers = nn.ModuleDict({"place": nn.Linear(width, 2)}).to(device)
        self.helpers.register_parameter("scale", nn.Parameter(torch.tensor(-0.5 * math.log(width), device=device)))
        self.class_ids = torch.tensor([*_CLASS_IDS, WORD_ID["empty"]], device=device)
        self.color_ids = torch.tensor([*_COLOR_IDS, WORD_ID["none"]], device=device)
        trained = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
        trained += [self.embeddings, *self.helpers.parameters()]
        self.parameters = trained
        decayed, free = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": free, "weight_decay": 0.0}]
        self.optimizers = [torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98))]

    def start(self) -> None:
        """Nothing to set up."""

    def rate(self, step: int, progress: float) -> float:
        """Factor on the learning rates: warm-up, then cosine."""
        return min(1, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        visual, class_logits, color_logits = self._logits(batch)
        weights = torch.where(objects_of(batch), 1.0, BACKGROUND_WEIGHT)
        named = weighted_loss(class_logits, batch["classes"], weights) + weighted_loss(
            color_logits, batch["colors"], weights
        )
        place = torch.stack([batch["positions"] // GRID, batch["positions"] % GRID], -1) / (GRID / 2) - 1
        return named + 0.5 * F.mse_loss(self.helpers["place"](visual), place) + 0.01 * _unit_size(visual)

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Share of object patches named rightly (class, class of digits, colour), and of background called empty."""
        return averages(_tally(batch, *self._logits(batch)[1:]) for batch in batches)

    def _logits(self, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        visual = project_patches(self.model, batch, self.precision)
        scale = self.helpers.scale.exp()
        return visual, *(visual @ self.embeddings[ids].T * scale for ids in (self.class_ids, self.color_ids))


class NeutralBackground:
    """Background patches learn to be like no word at all, while objects keep their names; embeddings stay fixed.

    SparseVLM's rater rule sums visual-textual dot products over all patches; a background that resembles a word would
    decide it. See README.md, "Limits".
    """

    _SCALE = 0.08

    def __init__(self, model: LlavaForConditionalGeneration, precision: torch.dtype = torch.bfloat16):
        self.model, self.precision = model, precision
        self.embeddings = model.model.language_model.embed_tokens.weight.detach()
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        self.helpers = nn.ModuleDict()
        self.parameters = [*tower.parameters(), *projector.parameters()]
        groups = [{"params": tower.parameters(), "lr": 8e-4}, {"params": projector.parameters(), "lr": 2e-4}]
        self.optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)]

    def start(self) -> None:
        """Nothing to set up."""

    def rate(self, step: int, progress: float) -> float:
        """Factor on the learning rates: short warm-up, then linear decay."""
        return min(1, (step + 1) / 20) * max(0.03, 1 - progress)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        visual, class_logits, color_logits, words = self._logits(batch)
        inside = objects_of(batch).float()
        named = weighted_loss(class_logits, batch["classes"].clamp(max=NO_CLASS - 1), inside)
        named = named + weighted_loss(color_logits, batch["colors"].clamp(max=NO_COLOR - 1), inside)
        return named + 0.02 * _mean(words.square().mean(-1), 1 - inside) + 0.01 * _unit_size(visual)

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        """As :meth:`Alignment.scores`, but of the background the mean squared dot product with the words."""
        tallies = []
        for batch in batches:
            _, class_logits, color_logits, words = self._logits(batch)
            outside = words.square().mean(-1)[~objects_of(batch)]
            dots = {"background_dot2": (outside.sum().item(), outside.numel())}
            tally = _tally(batch, class_logits, color_logits)
            del tally["background"]
            tallies.append(tally | dots)
        return averages(tallies)

    def _logits(self, batch):
        visual = project_patches(self.model, batch, self.precision)
        words = visual @ self.embeddings.T
        other = words[..., _OTHER_IDS]
        class_logits, color_logits = (
            torch.cat([words[..., ids], other], -1) * self._SCALE for ids in (_CLASS_IDS, _COLOR_IDS)
        )
        return visual, class_logits, color_logits, words[..., 1 : len(WORDS)]


def project_patches(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], precision: torch.dtype
) -> torch.Tensor:
    """Visual tokens as the language model sees them, float32 ``[B, patches, 192]``; computed in ``precision``."""
    pixels = batch["pixels"]
    with torch.autocast(pixels.device.type, dtype=precision, enabled=precision != torch.float32):
        features = embed_patches(model, pixels, batch["positions"])
        return model.model.multi_modal_projector(features).float()


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum() / weights.sum()


def weighted_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of ``[B, n, labels]`` logits against ``[B, n]`` targets under ``[B, n]`` weights."""
    return _mean(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"), weights.flatten())


def _unit_size(visual: torch.Tensor) -> torch.Tensor:
    """Keeps visual tokens at the size of word embeddings."""
    return (visual.square().mean(-1) - 1).square().mean()


def _tally(batch, class_logits, color_logits) -> dict[str, tuple[float, float]]:
    named, colored = class_logits.argmax(-1) == batch["classes"], color_logits.argmax(-1) == batch["colors"]
    inside, digits = objects_of(batch), batch["classes"] < len(DIGITS)
    parts = {"class": named[inside], "digit": named[digits], "color": colored[inside], "background": named[~inside]}
    return {name: (right.sum().item(), right.numel()) for name, right in parts.items()}
