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
from sparsevlm.mini.batches import ANSWER_WEIGHT, END_WEIGHT, PREFIX, QUESTION_TOKENS, averages, objects_of
from sparsevlm.mini.clips import DIRECTIONS, FRAMES
from sparsevlm.mini.model import embed_frames, embed_patches
from sparsevlm.mini.pretrain import BACKGROUND_WEIGHT, weighted_loss
from sparsevlm.mini.scenes import NO_CLASS, NO_COLOR

_PATCH_LABELS = [1, NO_CLASS + 1, NO_COLOR + 1]
_CLIP_LABELS = [FRAMES, FRAMES, len(DIRECTIONS) + 1]


@dataclass(frozen=True)
class Rates:
    """Highest learning rates: of the matrices (Muon), of the tower and of everything else (AdamW)."""

    matrices: float = 2.5e-3
    tower: float = 3e-4
    others: float = 1e-3


#: For a model that answers already: at the rates above it forgets what it knows about small things.
GENTLE = Rates(1.2e-3, 3e-4, 5e-4)


class Answering:
    """Several questions share one picture: each is a block that sees the picture and itself, at the same positions.

    Muon (``torch.optim.Muon``) trains the matrices of the language model and the projector, AdamW embeddings, head,
    norms, biases and the tower. With pictures, a helper that is dropped afterwards reads off each visual token what it
    shows (class and colour, as in stage 1, so that the tower forgets nothing) and whether it holds the middle of an
    object, which is what counting needs. With clips, a helper reads off the language model's visual tokens in the
    middle layer which frame they belong to, when their object came, and where it moves: positions are all that tells
    frames apart, and questions alone do not teach that within hours.

    Args:
        model: the embedded model, or the embedded video model.
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
        self.model, self.precision, self.types = model, precision, types
        language_model, projector = model.model.language_model, model.model.multi_modal_projector
        matrices = [p for p in (*language_model.layers.parameters(), *projector.parameters()) if p.ndim == 2]
        known = {id(p) for p in matrices}
        towers = [module for name, module in model.model.named_children() if name.endswith("_tower")]
        known |= {id(p) for tower in towers for p in tower.parameters()}
        tower = list(towers[-1].parameters())  # of a video model only that for videos
        width = language_model.config.hidden_size
        helpers = {"patch": nn.Linear(width, sum(_PATCH_LABELS)), "clip": nn.Linear(width, sum(_CLIP_LABELS))}
        self.helpers = nn.ModuleDict(helpers).to(model.device)
        for parameter in self.helpers.parameters():
            nn.init.zeros_(parameter)
        others = [p for p in model.parameters() if id(p) not in known] + list(self.helpers.parameters())
        self.parameters = matrices + others + tower
        self.optimizers = [
            torch.optim.Muon(matrices, lr=rates.matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rates.others, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.AdamW(tower, lr=rates.tower, betas=(0.9, 0.98), weight_decay=0.0),
        ]

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
        return loss + (self._patch_loss(visual, batch) if "centers" in batch else self._clip_loss(middle, batch))

    def _patch_loss(self, visual: torch.Tensor, batch) -> torch.Tensor:
        center, classes, colors = self.helpers["patch"](visual).split(_PATCH_LABELS, -1)
        weights = torch.where(objects_of(batch), 1.0, BACKGROUND_WEIGHT)
        named = weighted_loss(classes, batch["classes"], weights) + weighted_loss(colors, batch["colors"], weights)
        return F.binary_cross_entropy_with_logits(center[..., 0], batch["centers"]) + 0.3 * named

    def _clip_loss(self, middle: torch.Tensor, batch) -> torch.Tensor:
        parts = self.helpers["clip"](F.rms_norm(middle, middle.shape[-1:])).split(_CLIP_LABELS, -1)
        targets = (batch["times"], batch["starts"], batch["directions"])
        losses = [F.cross_entropy(p.flatten(0, 1), t.flatten()) for p, t in zip(parts, targets, strict=True)]
        return 0.3 * sum(losses)

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

    def _run(self, batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits of the questions and, for clips, the visual tokens in the middle layer ``[B, 520, 192]``."""
        model, ids = self.model, batch["ids"]
        language_model, device = model.model.language_model, ids.device
        with self._autocast(device):
            prefix = language_model.embed_tokens(torch.tensor(PREFIX, device=device)).expand(len(ids), -1, -1)
            inputs = torch.cat([prefix, visual, language_model.embed_tokens(ids)], 1)
            mask, positions = block_layout(inputs.shape[1] - ids.shape[1], ids.shape[1] // QUESTION_TOKENS, device)
            output = language_model(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                output_hidden_states="times" in batch,
            )
            logits = model.lm_head(output.last_hidden_state[:, -ids.shape[1] :]).float()
        if "times" not in batch:
            return logits, None
        middle = output.hidden_states[len(language_model.layers) // 2][:, len(PREFIX) : -ids.shape[1]]
        return logits, middle.float()


def block_layout(shared: int, blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mask and positions of ``blocks`` questions behind ``shared`` tokens.

    Returns:
        mask: float32 ``[1, 1, L, L]`` to add to the attention logits, 0 where the row's token may see the column's:
            causal, and among the questions only within the own block. (A boolean mask would do for SDPA alone.)
        positions: int64 ``[1, L]``; every block starts at position ``shared``, as if it were alone.
    """
    offsets = torch.arange(QUESTION_TOKENS, device=device).repeat(blocks)
    positions = torch.cat([torch.arange(shared, device=device), shared + offsets])
    block = torch.full((len(positions),), -1, device=device)
    block[shared:] = torch.arange(blocks, device=device).repeat_interleave(QUESTION_TOKENS)
    order = torch.arange(len(positions), device=device)
    visible = (block[None] == -1) | (block[None] == block[:, None])
    visible &= order[None] <= order[:, None]
    mask = torch.zeros(visible.shape, device=device).masked_fill(~visible, torch.finfo(torch.float32).min)
    return mask[None, None], positions[None]
