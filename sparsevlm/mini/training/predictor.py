"""Training of Dynamic-LLaVA's image predictor on a frozen model.

All visual tokens stay; Gumbel decisions about them weigh the keys of the layers from `layer` on. Loss: cross entropy of
the answers + 100 (rate - share kept)^2. The model is small and its attention peaked, which needs what the authors' 7B
did not: the gradient that reaches a single decision is clamped (that of one token can be 10^6 times the median, and a
predictor that follows it keeps everything within 20 steps), and the predictor starts at the rate.

It is trained on windows of 12 x 12 patches and used on whole pictures, which works because it knows no positions. The
output predictor is not trained: the authors train it on answers of 50 tokens and more, answers here have one or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevlm.core.policy import EPS, bounded_gradient, gumbel, rate_loss, straight_through
from sparsevlm.methods._predictors import Predictors, Sizes
from sparsevlm.mini.model import embed_patches
from sparsevlm.mini.training.batches import ANSWER_WEIGHT, END_WEIGHT, PREFIX, QUESTION_TOKENS, averages
from sparsevlm.mini.training.finetune import packed_inputs, positions_of
from sparsevlm.mini.training.policy import POLICY, Policy

LEARNING_RATE, RATE_WEIGHT, GRADIENT_LIMIT = 2e-3, 100.0, 0.02
_WARM_UP = 20


class FrozenObjective:
    """What the trainings of modules on a frozen model share; `TrainingRun` describes the interface.

    Args:
        model: the embedded model; its weights are frozen and its attention is replaced.
        modules: what is trained.
        seed: of the noise, which depends on it and the step alone.

    Attributes:
        facts: what the file of the modules says besides (`methods._modules`).
    """

    facts: dict[str, object]
    eps = EPS  # of the policy's attention

    def __init__(self, model, modules: nn.Module, seed: int):
        model.requires_grad_(False)
        model.set_attn_implementation({"text_config": POLICY})
        self.model, self.helpers, self.seed = model, modules.to(model.device), seed
        self.parameters = list(modules.parameters())
        self.optimizers = [torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)]
        self.progress = 0.0
        self.noise = torch.Generator()

    def start(self) -> None:
        """Nothing to set up."""

    def rate(self, step: int, progress: float) -> float:
        """Factor on the learning rate: warm-up, then cosine."""
        self.progress = progress
        self.noise.manual_seed((self.seed << 32) + step)
        return min(1, (step + 1) / _WARM_UP) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))

    def run(
        self, batch: dict[str, Tensor], decide: dict[int, Callable[[Tensor, Policy], Tensor]], delay: int = 0
    ) -> Tensor:
        """Compute the logits [B, questions * 12, words] of the questions.

        Args:
            batch: of `SceneBatches`.
            decide: by layer, from the states [B, L, D] that enter it to the policy [B, visual tokens] from there on.
            delay: layers after it before the policy applies.
        """
        model, language_model = self.model, self.model.model.language_model
        with torch.no_grad():
            features = embed_patches(model, batch["pixels"], batch["positions"])
            inputs = packed_inputs(model, batch, model.model.multi_modal_projector(features))
        policy, shared = Policy(eps=self.eps), inputs.shape[1] - batch["ids"].shape[1]

        def hook(layer: int):
            def enter(module, args):
                kept = decide[layer](args[0], policy)
                policy.rows[layer + delay] = torch.cat([kept.new_ones(len(kept), len(PREFIX)), kept], 1)

            return language_model.layers[layer].register_forward_pre_hook(enter)

        hooks = [hook(layer) for layer in decide]
        try:
            states = language_model(
                inputs_embeds=inputs,
                position_ids=positions_of(batch, shared),
                use_cache=False,
                shared=shared,
                policy=policy,
            ).last_hidden_state
        finally:
            for handle in hooks:
                handle.remove()
        return model.lm_head(states[:, shared:])

    def answer_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Compute the weighted cross entropy of the answers."""
        weights = batch["weights"].flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum()


def right_answers(logits: Tensor, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Return how many questions are answered rightly, up to the answer's end, and how many there are."""
    answers = (batch["weights"] == ANSWER_WEIGHT) | (batch["weights"] == END_WEIGHT)
    right = ((logits.argmax(-1) == batch["targets"]) | ~answers).view(-1, QUESTION_TOKENS).all(-1)
    return right.sum().item(), right.numel()


def visual_rows(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the visual tokens [B, patches, D] of states [B, L, D]."""
    return states[:, len(PREFIX) : len(PREFIX) + batch["positions"].shape[1]]


class KeepPredictor(FrozenObjective):
    """Trains the image predictor.

    Args:
        model: the embedded model.
        rate: share of the visual tokens that shall stay.
        layer: 0-based layer that the states enter, the first that weighs its keys.
        seed: of the predictor's start and the noise.
    """

    def __init__(self, model, rate: float, layer: int, seed: int = 0):
        sizes = Sizes.of(model.config.text_config.hidden_size)
        sizes = Sizes(sizes.hidden, sizes.width, sizes.heads, sizes.feed_forward, sizes.blocks, text_width=0)
        super().__init__(model, Predictors(sizes).start(seed, rate), seed)
        self.keep, self.layer = rate, layer
        self.facts = {"layer": layer, "heads": sizes.heads}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        decisions: list[Tensor] = []

        def decide(states: Tensor, policy: Policy) -> Tensor:
            scores = self._log_probabilities(visual_rows(states, batch))
            noise = gumbel(scores.shape, self.noise).to(scores.device)
            decisions.append(straight_through(scores, noise, temperature=0.1**self.progress))
            return bounded_gradient(decisions[0].clone(), GRADIENT_LIMIT)

        loss = self.answer_loss(self.run(batch, {self.layer: decide}), batch)
        return loss + RATE_WEIGHT * rate_loss(decisions[0], self.keep)

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Share answered rightly with the best int(N rate) tokens, and the share with a keep probability above half."""
        tallies = []
        for batch in batches:
            likely: list[Tensor] = []

            def decide(states: Tensor, policy: Policy, batch=batch, likely=likely) -> Tensor:
                scores = self._log_probabilities(visual_rows(states, batch))
                likely.append(scores[..., 0] > scores[..., 1])
                best = scores[..., 0].topk(int(scores.shape[1] * self.keep), 1).indices
                return torch.zeros_like(scores[..., 0]).scatter(1, best, 1.0)

            logits = self.run(batch, {self.layer: decide})
            share = (likely[0].sum().item(), likely[0].numel())
            tallies.append({"answers": right_answers(logits, batch), "likely": share})
        return averages(tallies)

    def _log_probabilities(self, states: Tensor) -> Tensor:
        return self.helpers.image_score_predictor(states).log_softmax(-1)
