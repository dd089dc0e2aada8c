"""Stage 2: questions and answers - language model, projector, embeddings; the tower is frozen, as in LLaVA."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from sparsevlm.mini import questions
from sparsevlm.mini.batches import ANSWER_WEIGHT, END_WEIGHT, PREFIX, QUESTION_TOKENS, averages
from sparsevlm.mini.model import embed_patches


class Answering:
    """Several questions share one picture: each is a block that sees the picture and itself, at the same positions.

    Muon (``torch.optim.Muon``) trains the matrices of the language model and the projector, AdamW embeddings, head,
    norms and biases.
    """

    def __init__(self, model: LlavaForConditionalGeneration, precision: torch.dtype = torch.bfloat16):
        self.model, self.precision = model, precision
        language_model, projector = model.model.language_model, model.model.multi_modal_projector
        matrices = [p for p in (*language_model.layers.parameters(), *projector.parameters()) if p.ndim == 2]
        known = {id(p) for p in matrices}
        tower = {id(p) for p in model.model.vision_tower.parameters()}
        others = [p for p in model.parameters() if id(p) not in known | tower]
        self.helpers = nn.ModuleDict()
        self.parameters = matrices + others
        self.optimizers = [
            torch.optim.Muon(matrices, lr=2.5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
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
        logits = self._logits(batch).flatten(0, 1)
        weights = batch["weights"].flatten()
        losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum()

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Exact match of the answer and its end (what greedy decoding would score), per type, and the mean of types."""
        scores = averages(self._tally(batch) for batch in batches)
        return scores | {"mean": sum(scores.values()) / len(scores)}

    def _tally(self, batch) -> dict[str, tuple[float, float]]:
        answers = (batch["weights"] == ANSWER_WEIGHT) | (batch["weights"] == END_WEIGHT)
        right = (self._logits(batch).argmax(-1) == batch["targets"]) | ~answers
        right = right.view(*batch["types"].shape, QUESTION_TOKENS).all(-1)
        by_type = {name: right[batch["types"] == i] for i, name in enumerate(questions.TYPES)}
        return {name: (values.sum().item(), values.numel()) for name, values in by_type.items()}

    def _logits(self, batch) -> torch.Tensor:
        """``[B, questions * 12, words]``"""
        model, ids = self.model, batch["ids"]
        language_model, device = model.model.language_model, ids.device
        with torch.autocast(device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            with torch.no_grad():
                features = embed_patches(model, batch["pixels"], batch["positions"])
            visual = model.model.multi_modal_projector(features).float()
            prefix = language_model.embed_tokens(torch.tensor(PREFIX, device=device)).expand(len(ids), -1, -1)
            inputs = torch.cat([prefix, visual, language_model.embed_tokens(ids)], 1)
            mask, positions = block_layout(inputs.shape[1] - ids.shape[1], ids.shape[1] // QUESTION_TOKENS, device)
            hidden = language_model(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            return model.lm_head(hidden[:, -ids.shape[1] :]).float()


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
