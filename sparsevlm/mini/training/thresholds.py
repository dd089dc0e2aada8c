"""Training of ATP-LLaVA's thresholds on a frozen model (after a third party's reading, see `methods.atp_llava`).

Soft masks weigh the keys of the layers after each stage, a token's policy is the product of its masks so far. Loss:
cross entropy of the answers + .05 sum_l l kept_l / V + .2 |mean kept - target|, as in the port. The temperature of the
masks rises from 10 to 100 as training goes on, so that in the end they are nearly those of the inference.

One question a picture: text decides what stays, so that questions cannot share one. Whole pictures: the scores are
relative to the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sparsevlm.core.policy import bounded_gradient, policy_weights
from sparsevlm.core.thresholds import (
    LAYER_WEIGHT,
    TARGET_WEIGHT,
    TEMPERATURE,
    excess,
    layer_penalty,
    received,
    relative,
    soft_mask,
    spatial_scores,
    stride_of,
    target_loss,
)
from sparsevlm.methods._grid import grid_sample
from sparsevlm.methods._threshold_files import start
from sparsevlm.mini.scenes import GRID
from sparsevlm.mini.training.batches import ANSWER_WEIGHT, PREFIX, averages
from sparsevlm.mini.training.finetune import positions_of
from sparsevlm.mini.training.policy import Policy
from sparsevlm.mini.training.predictor import GRADIENT_LIMIT, FrozenObjective, right_answers, visual_rows

LEARNING_RATE = 2e-2
_SHARPEST = 10.0  # factor on the temperature in the end


class ThresholdTraining(FrozenObjective):
    """Trains the modules of all stages.

    Args:
        model: the embedded model.
        target: mean over the stages of the tokens that shall be left after them.
        layers: 0-based, after which tokens go.
        sampling: share of the uniform sample.
        seed: of the modules' start.
    """

    def __init__(self, model, target: float, layers: tuple[int, ...], sampling: float, seed: int = 0):
        super().__init__(model, start(layers, seed), seed)
        for group in self.optimizers[0].param_groups:
            group["lr"] = LEARNING_RATE
        self.target, self.layers, self.sampling = target, layers, sampling
        self.facts = {"layers": ",".join(map(str, layers)), "variant": "normalised", "sampling": sampling}
        sample = torch.from_numpy(grid_sample(GRID * GRID, stride_of(sampling)))
        self.spatial = spatial_scores(sample, sampling).to(model.device)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        kept: list[Tensor] = []
        logits = self._run(batch, kept, TEMPERATURE * _SHARPEST**self.progress)
        penalty = LAYER_WEIGHT * layer_penalty(kept, self.layers, batch["positions"].shape[1])
        return self.answer_loss(logits, batch) + penalty + TARGET_WEIGHT * target_loss(kept, self.target)

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Share answered rightly and tokens left after each stage, with hard masks."""
        tallies = []
        for batch in batches:
            kept: list[Tensor] = []
            logits = self._run(batch, kept, None)
            left = {f"after {layer}": (k.sum().item(), len(k)) for layer, k in zip(self.layers, kept, strict=True)}
            tallies.append({"answers": right_answers(logits, batch)} | left)
        return averages(tallies)

    def _run(self, batch: dict[str, Tensor], kept: list[Tensor], temperature: float | None) -> Tensor:
        """Compute the logits; append the tokens [B] left after each stage. Temperature None = hard masks."""

        def stage(number: int):
            def decide(states: Tensor, policy: Policy) -> Tensor:
                above = self.above(number, states, policy, batch)
                mask = (above > 0).to(above.dtype) if temperature is None else soft_mask(above, temperature)
                mask = mask * self._policy(self.layers[number], states, policy, batch)
                kept.append(mask.sum(1))
                return bounded_gradient(mask.clone(), GRADIENT_LIMIT)

            return decide

        return self.run(batch, {layer: stage(i) for i, layer in enumerate(self.layers)}, delay=1)

    def _policy(self, layer: int, states: Tensor, policy: Policy, batch: dict[str, Tensor]) -> Tensor:
        """Return the policy [B, V] of the visual tokens in a layer."""
        row = policy.at(layer)
        if row is None:
            return states.new_ones(len(states), batch["positions"].shape[1])
        return row[:, len(PREFIX) :]

    def above(self, number: int, states: Tensor, policy: Policy, batch: dict[str, Tensor]) -> Tensor:
        """Compute how far the visual tokens [B, V] are above their thresholds, from the states entering the layer."""
        layer, visual = self.layers[number], batch["positions"].shape[1]
        shown = self._policy(layer, states, policy, batch)
        attention = self._attention(layer, states, shown, batch)
        rows = states.new_zeros(states.shape[:2])
        rows[:, len(PREFIX) : len(PREFIX) + visual] = shown.detach()
        own, level_self = relative(received(attention, rows), shown.detach())
        asked = (batch["weights"] == ANSWER_WEIGHT).float().argmax(1) + 1  # tokens before the answer
        order = torch.arange(batch["ids"].shape[1], device=states.device)
        text = states.new_zeros(states.shape[:2])
        text[:, len(PREFIX) + visual :] = (order < asked[:, None]).to(states.dtype)
        cross, level_cross = relative(received(attention, text), shown.detach())
        theta_r, theta_s = self.helpers[number](level_self, level_cross)
        spatial = self.spatial.expand_as(own)
        return excess((own + cross) / 2, spatial, softplus(theta_r), theta_s.sigmoid())

    @torch.no_grad()
    def _attention(self, layer: int, states: Tensor, shown: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Compute the attention [B, H, L, V] of a layer to the visual tokens, under the policy that holds there."""
        language_model = self.model.model.language_model
        module, visual = language_model.layers[layer], visual_rows(states, batch).shape[1]
        shared = len(PREFIX) + visual
        cos, sin = language_model.rotary_emb(states, position_ids=positions_of(batch, shared))
        normed, attention = module.input_layernorm(states), module.self_attn
        query, key = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        query, key = (_rotate(x, cos, sin) for x in (query, key))
        length = states.shape[1]
        order = torch.arange(length, device=states.device)
        logits = (query @ key.mT * attention.scaling).masked_fill(order > order[:, None], float("-inf"))
        row = torch.cat([shown.new_ones(len(shown), len(PREFIX)), shown], 1)
        row = torch.cat([row, row.new_ones(len(row), length - shared)], 1)
        weights, _ = policy_weights(logits, row[:, None], order == order[:, None], self.eps)
        return weights[..., len(PREFIX) : shared]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
