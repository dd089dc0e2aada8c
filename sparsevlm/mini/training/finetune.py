"""Stage 2: questions and answers. Everything is trained, the tower slowly (LLaVA-1.5 freezes it: CLIP has read text and
counted things in its own training, this tower has only named patches)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration, VideoLlavaForConditionalGeneration

from sparsevlm.mini import questions
from sparsevlm.mini.clips import DIRECTIONS, FRAME_TOKENS, FRAMES
from sparsevlm.mini.clips import GRID as CLIP_GRID
from sparsevlm.mini.model import embed_frames, embed_patches
from sparsevlm.mini.scenes import GRID, NO_CLASS, NO_COLOR
from sparsevlm.mini.training.batches import (
    ANSWER_WEIGHT,
    END_WEIGHT,
    PREFIX,
    QUESTION_TOKENS,
    RANKS,
    averages,
    objects_of,
)
from sparsevlm.mini.training.packed import PACKED, packed_positions
from sparsevlm.mini.training.pretrain import BACKGROUND_WEIGHT, weighted_loss

#: What a helper reads off a visual token, and how many values each can have.
_PATCH_LABELS = {"centers": 1, "classes": NO_CLASS + 1, "colors": NO_COLOR + 1}
_SCENE_LABELS = {
    "left_classes": NO_CLASS + 1,
    "left_colors": NO_COLOR + 1,
    "color_ranks": RANKS,
    "class_ranks": RANKS,
}
_CLIP_LABELS = {"times": FRAMES, "starts": FRAMES, "directions": len(DIRECTIONS) + 1}


@dataclass(frozen=True)
class Rates:
    """Highest learning rates: of the matrices (Muon), of the tower and of everything else (AdamW)."""

    matrices: float = 2.5e-3
    tower: float = 3e-4
    others: float = 1e-3


#: For a model that answers already.
GENTLE = Rates(2e-3, 3e-4, 1e-3)


class Answering:
    """Several questions share one picture: each is a block that sees the picture and itself, at the same positions.

    Muon (``torch.optim.Muon``) trains the matrices of the language model and the projector, AdamW embeddings, head,
    norms, biases and the tower.

    The language model's attention is set to :func:`~sparsevlm.mini.training.packed.packed_attention`. Set it back
    before the model is used for anything else.

    Questions alone teach relations slowly, so helpers, which are dropped afterwards, are asked about every visual
    token. With pictures, off what the projector gives: what the token shows (class and colour, as in stage 1, so that
    the tower forgets nothing) and whether it holds the middle of an object; and off the language model after a third of
    its layers: what stands at the left of its object, and which of its colour and of its class it is in reading order.
    With clips, off what the projector gives: where in the frame the token lies; and off the language model after half
    of its layers: which frame it belongs to, when its object came, and where that moves.

    Args:
        model: the embedded model, a guide for it, or the embedded video model; parameters that require no gradient stay
            as they are.
        precision: of the forward pass.
        types: the names of the question types of the batches.
        rates: highest learning rates.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration | VideoLlavaForConditionalGeneration,
        precision: torch.dtype = torch.bfloat16,
        types: tuple[str, ...] = questions.TYPES,
        rates: Rates | None = None,
    ):
        rates = rates or Rates()
        model.set_attn_implementation({"text_config": PACKED})
        self.model, self.precision, self.types = model, precision, types
        language_model, projector = model.model.language_model, model.model.multi_modal_projector
        matrices = [p for p in (*language_model.layers.parameters(), *projector.parameters()) if p.ndim == 2]
        known = {id(p) for p in matrices}
        towers = [module for name, module in model.model.named_children() if name.endswith("_tower")]
        known |= {id(p) for tower in towers for p in tower.parameters()}
        tower = list(towers[-1].parameters())  # of a video model only that for videos
        width = language_model.config.hidden_size
        labels = {"patch": _PATCH_LABELS, "scene": _SCENE_LABELS, "clip": _CLIP_LABELS}
        helpers = {name: nn.Linear(width, sum(sizes.values())) for name, sizes in labels.items()}
        helpers["place"] = nn.Linear(width, 2)
        self.helpers = nn.ModuleDict(helpers).to(model.device)
        for parameter in self.helpers.parameters():
            nn.init.zeros_(parameter)
        others = [p for p in model.parameters() if id(p) not in known] + list(self.helpers.parameters())
        matrices, others, tower = ([p for p in group if p.requires_grad] for group in (matrices, others, tower))
        self.parameters = matrices + others + tower
        self.optimizers = [
            torch.optim.Muon(matrices, lr=rates.matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rates.others, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        if tower:
            self.optimizers.append(torch.optim.AdamW(tower, lr=rates.tower, betas=(0.9, 0.98), weight_decay=0.0))

    @torch.no_grad()
    def start(self) -> None:
        """The output head starts as the word embeddings that stage 1 has learnt."""
        embeddings = self.model.model.language_model.embed_tokens.weight
        self.model.lm_head.weight.copy_(embeddings / math.sqrt(embeddings.shape[1]))

    def rate(self, step: int, progress: float) -> float:
        """Factor on the learning rates: warm-up, constant, linear decay over the second half."""
        return min(1, (step + 1) / 60) * min(1.0, max(0.02, 2 * (1 - progress)))

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        visual = self._visual(batch)
        logits, middle = self._run(batch, visual)
        logits = logits.flatten(0, 1)
        weights = batch["weights"].flatten()
        losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        if "times" in batch:
            return loss + self._place_loss(visual) + sum(self._read_off("clip", _CLIP_LABELS, middle, batch))
        return loss + self._patch_loss(visual, batch) + sum(self._read_off("scene", _SCENE_LABELS, middle, batch))

    def _patch_loss(self, visual: torch.Tensor, batch) -> torch.Tensor:
        center, classes, colors = self.helpers["patch"](visual).split(list(_PATCH_LABELS.values()), -1)
        weights = torch.where(objects_of(batch), 1.0, BACKGROUND_WEIGHT)
        named = weighted_loss(classes, batch["classes"], weights) + weighted_loss(colors, batch["colors"], weights)
        centers = F.binary_cross_entropy_with_logits(center[..., 0], batch["centers"], weights) / weights.mean()
        return centers + named

    def _place_loss(self, visual: torch.Tensor) -> torch.Tensor:
        places = self.helpers["place"](visual.unflatten(1, (FRAMES, FRAME_TOKENS))[:, :, 1:])
        axis = torch.linspace(-1, 1, CLIP_GRID, device=visual.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
        return F.mse_loss(places, grid.expand_as(places))

    def _read_off(self, helper: str, labels: dict[str, int], middle: torch.Tensor, batch) -> list[torch.Tensor]:
        parts = self.helpers[helper](F.rms_norm(middle, middle.shape[-1:])).split(list(labels.values()), -1)
        pairs = zip(parts, labels, strict=True)
        return [F.cross_entropy(part.flatten(0, 1), batch[name].flatten()) for part, name in pairs]

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Exact match of the answer and its end (what greedy decoding would score), per type, and the mean of types."""
        scores = averages(self._tally(batch) for batch in batches)
        return scores | {"mean": sum(scores.values()) / len(scores)}

    def _tally(self, batch) -> dict[str, tuple[float, float]]:
        answers = (batch["weights"] == ANSWER_WEIGHT) | (batch["weights"] == END_WEIGHT)
        right = (self._logits(batch, self._visual(batch)).argmax(-1) == batch["targets"]) | ~answers
        right = right.view(*batch["types"].shape, QUESTION_TOKENS).all(-1)
        by_type = {name: right[batch["types"] == i] for i, name in enumerate(self.types)}
        return {name: (values.sum().item(), values.numel()) for name, values in by_type.items()}

    def _visual(self, batch) -> torch.Tensor:
        """float32 ``[B, visual tokens, 192]``"""
        with self._autocast(batch["pixels"].device):
            if "positions" in batch:
                features = embed_patches(self.model, batch["pixels"], batch["positions"])
            else:
                features = embed_frames(self.model, batch["pixels"])
            return self.model.model.multi_modal_projector(features).float()

    def _autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def _logits(self, batch, visual: torch.Tensor) -> torch.Tensor:
        """``[B, questions * 12, words]``"""
        return self._run(batch, visual)[0]

    def _run(self, batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the questions, and the visual tokens after a third (clips: half) of the layers."""
        model, ids = self.model, batch["ids"]
        language_model, device = model.model.language_model, ids.device
        with self._autocast(device):
            inputs = packed_inputs(model, batch, visual)
            shared = inputs.shape[1] - ids.shape[1]
            output = language_model(
                inputs_embeds=inputs,
                position_ids=positions_of(batch, shared),
                use_cache=False,
                output_hidden_states=True,
                shared=shared,
            )
            logits = model.lm_head(output.last_hidden_state[:, -ids.shape[1] :]).float()
        layer = max(1, len(language_model.layers) // (2 if "times" in batch else 3))
        middle = output.hidden_states[layer][:, len(PREFIX) : shared]
        return logits, middle.float()


def packed_inputs(model, batch: dict[str, torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
    """``[B, L, 192]``: the beginning of a prompt, the picture's tokens, and the questions behind it."""
    embed, ids = model.model.language_model.embed_tokens, batch["ids"]
    prefix = embed(torch.tensor(PREFIX, device=ids.device)).expand(len(ids), -1, -1)
    return torch.cat([prefix, visual, embed(ids)], 1)


def positions_of(batch: dict[str, torch.Tensor], shared: int) -> torch.Tensor:
    """``[B, L]``: a window's tokens keep the places they have in the whole picture, as do the questions behind it."""
    ids = batch["ids"]
    places = torch.arange(shared, device=ids.device).expand(len(ids), -1)
    behind = shared
    if "positions" in batch:
        places = torch.cat([places[:, : len(PREFIX)], len(PREFIX) + batch["positions"]], 1)
        behind = len(PREFIX) + GRID * GRID
    return packed_positions(places, behind, ids.shape[1] // QUESTION_TOKENS)
