"""Dynamic-LLaVA (arXiv 2412.00876v4, ICLR 2025): a trained predictor says which visual tokens stay.

1. Layers 0 ... k - 1 see every visual token (k = 2 of 32).
2. The image predictor reads the states of all visual tokens that enter layer k; the score is log p(keep).
3. The best int(N r) stay from layer k on, in their order, with their original position ids.
4. With `gate`, the output predictor reads the state of every generated token that enters layer k. Where it prefers to
   drop (strictly: unless logit 0 > logit 1), later tokens do not see the token's key in layers k and above. The token
   sees itself in its own step, and positions count on. Prompts, also of later turns, are never gated.

Because pictures come before questions and attention is causal, the states do not contain the question: the selection
cannot depend on it.

Weights: `predictor` is a file that `python -m sparsevlm.mini.training.modules dynamic_llava` writes, or the folder of
the authors' checkpoint (Osilly/Dynamic-LLaVA-7B or -13B; their language model is trained, too, so that its predictors
belong to its weights only). None = the predictor that is shipped for `mini`. "untrained" = one with random weights, a
control: a random function of the content is not a random selection, so use several seeds. The mark of every result is
"trained".

Source: the paper and Osilly/dynamic_llava e1469bc, llava/model/language_model/dynamic_modeling_llama.py. Deviations:
- Class 0 is "keep", as in the code; the paper's equation 5 says the second. The paper keeps where that class is more
  likely, a varying number; the code, and this method, the best int(N r).
- The gate is exact in batches: the authors' pads the cache with zero keys that are attended. A slot stays in the cache
  and is masked (`runtime/gate.py`), so that no memory is saved here.
- Without a cache answers are those with it. The authors' uncached code keeps as many past answer tokens as have
  logit 0 > logit 1, but those of the highest logit 0; and in the first step the last prompt token stands twice in
  layers k and above, which changes the first answer token.
- Padding is masked in all layers, and in the predictor (theirs: in layer 0 only).
- Several pictures of a prompt are scored together, as one set; the authors' code knows one picture.
- Scores are at least float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsevlm.budget import Schedule, explicit_schedule, scale_layers
from sparsevlm.core.precision import at_least_float32
from sparsevlm.methods._predictor_files import Predictor, untrained
from sparsevlm.methods._predictor_files import find as find_predictor
from sparsevlm.methods.bases import PruneOnce
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.stage import Stage

UNTRAINED = "untrained"
_FIRST_LAYER = 1  # of 32, on whose output pruning acts: the authors' sparse_layer 2
_OFF_RATE = 0.1  # relative distance from the trained rate that is worth a warning


@dataclass(frozen=True)
class DynamicLLaVA(PruneOnce):
    """Dynamic-LLaVA. `match` as in `PruneOnce`; `early_drop` has no effect.

    Without a budget and `keep`, the share stays that the predictor was trained for.

    Attributes:
        k: number of layers that see everything; None = the predictor's.
        keep: visual tokens kept, instead of a budget.
        predictor: file or folder of the weights, "untrained", or None = the one shipped for `mini`.
        gate: generated tokens are written to the caches of layers k and above only if the output predictor says so.
        seed: of an untrained predictor.
    """

    predictor: str | None = None
    gate: bool = False
    seed: int = 0

    name: ClassVar[str] = "dynamic_llava"
    scores_next: ClassVar[bool] = True
    reads_text: ClassVar[bool] = False

    def where(self, n_layers: int) -> tuple[int, ...]:
        return scale_layers(n_layers, (_FIRST_LAYER,)) if self.k is None else (self.k - 1,)

    def attach(self, family: Family) -> Predictor:
        if self.predictor == UNTRAINED:
            found = untrained(family, self.where(family.n_layers)[0] + 1, self.seed)
        else:
            found = find_predictor(self.predictor, family)
        if self.gate and found.modules.output_text_score_predictor is None:
            raise ValueError(
                f"gate=True needs an output predictor, which {found.source} does not have: it is trained on answers of "
                "50 tokens and more. Use gate=False, or a file that has one"
            )
        layer = found.layer if self.k is None else self.k
        if not 1 <= layer <= family.n_layers - 2:
            last = family.n_layers - 2
            use = f"k=1 ... {last}" if last > 0 else "a model of three layers or more"
            raise ValueError(
                f"the predictor's layer {layer} does not fit a model of {family.n_layers} layers. Use {use}"
            )
        weight = next(family.decoder.layers[layer].parameters())
        dtype = at_least_float32(weight.dtype if weight.is_floating_point() else torch.float32)
        return replace(found, layer=layer, modules=found.modules.to(weight.device, dtype).requires_grad_(False))

    def schedule(self, n_visual: int, n_layers: int, attached: Predictor) -> Schedule:
        if self.budget == "full":
            return super().schedule(n_visual, n_layers, attached)
        known = replace(self, k=attached.layer)
        if self.budget is None and self.keep is None:
            if attached.rate is None:
                raise ValueError(f"{attached.source} was trained for no share of the tokens. Use a budget, or keep")
            known = replace(known, keep=max(1, int(n_visual * attached.rate)))
        plan = known.plan(n_visual, n_layers)
        if attached.rate is not None and plan.keep and plan.keep[-1] < n_visual:
            share = plan.keep[-1] / n_visual
            if abs(share - attached.rate) > _OFF_RATE * attached.rate:
                warnings.warn(
                    f"dynamic_llava keeps {share:.3f} of the visual tokens with a predictor that was trained to keep "
                    f"{attached.rate:.3f} (off-distribution). Train one for this rate to compare with the paper",
                    stacklevel=2,
                )
        return plan

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        if self.budget is None and self.keep is None:  # how many stay is known to the predictor only (`schedule`)
            return explicit_schedule(n_visual, n_layers, self.where(n_layers), (n_visual,))
        return super().plan(n_visual, n_layers)

    def plan_budget(self, budget: int, n_visual: int, n_layers: int) -> Schedule:
        if self.k is None:
            return replace(self, k=self.where(n_layers)[0] + 1).plan_budget(budget, n_visual, n_layers)
        return super().plan_budget(budget, n_visual, n_layers)

    def score(self, stage: Stage) -> Tensor:
        modules = stage.prefill.attached.modules
        valid = stage.visual_valid
        logits = modules.image_score_predictor(_cast(stage.visual(), modules), valid)
        scores = logits.log_softmax(-1)[..., 0]
        if (
            not scores.is_meta
            and not (torch.isfinite(scores) if valid is None else torch.isfinite(scores) | ~valid).all()
        ):
            raise ValueError(
                "the image predictor's scores are no numbers: the states of the visual tokens are not finite. Use "
                "dtype='float32' or 'bfloat16', which hold larger states than float16"
            )
        return scores

    def gated_layer(self, attached: Predictor) -> int | None:
        return attached.layer if self.gate else None

    def writes(self, attached: Predictor, states: Tensor) -> Tensor:
        logits = attached.modules.output_text_score_predictor(_cast(states, attached.modules))
        return logits[..., 0] > logits[..., 1]


def _cast(states: Tensor, modules: nn.Module) -> Tensor:
    weight = next(modules.parameters())
    return states.to(weight.device, weight.dtype)
