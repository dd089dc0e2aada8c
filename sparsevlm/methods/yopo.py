"""YOPO (arXiv 2410.06169v3): computation of visual tokens is removed, and all of the tokens stay.

1. Window: a visual token sees the visual tokens of its picture that are at most (w - 1) / 2 rows and columns away on
   their grid, later ones, too: within the window attention is bidirectional. What it sees of text, and what text sees,
   stays causal. A window that covers the picture is therefore not the unpruned model; `causal_window` is.
2. Heads: a mask [layers, heads] says which heads visual tokens keep. In the others no row sees visual keys, and visual
   rows have no output. In later steps the heads do not see them either.
3. FFN: visual rows use the first share of each MLP's hidden neurons.
4. Layer cut: from layer `cut` on no row sees visual keys.

Two forms. `removal="masked"` is what the authors' code computes: everything runs, and attention to what is removed is
set to zero *after* the softmax, so that it stays in the denominator. It saves nothing, and is counted so.
`removal="real"` removes: at the cut the visual tokens leave the sequence (as PyramidDrop would drop all of them), a
removed head has no queries, keys, values and outputs of visual tokens, a row of the grid is computed with the rows
within reach, and the MLP's products are sliced. Softmaxes are over what is seen; the answers differ from "masked" where
heads or layers are cut, and agree with it where only window and FFN are.

A budget is one of computation: it sets `cut`, and nothing else, so that the visual tokens cost as many multiply-adds as
`budget` of them would in every layer. The count, as in the paper's formula, leaves out the cross products with text;
layers being whole, it is met to half a layer.

Heads are calibrated (`python -m sparsevlm.mini.heads`; see methods/_heads.py), and `heads=0.5` is the calibration that
comes with `mini`. The authors retrain LLaVA with the reductions; here the model is used as it is.

Source: the paper and the authors' code (ZhangAIPI/YOPO_MLLM_Pruning f0783f4, modeling_llama_prune.py; MIT).
Deviations: the picture's place is that of the prompt, not rows 35 ... 610; each picture has its own grid (between
pictures attention is causal); an even window is refused (theirs, of w, acts as w - 1); calls that only continue a
prompt are recognised by having no visual tokens, not by being shorter than 576; head masks apply to all samples of a
batch when decoding, not to the first one; layers may keep no head; a share of the heads is one threshold for all
layers, where the authors' calibration keeps the first two layers whole (`methods/_heads.py:votes`). In the real form,
removed heads hold zeros in the cache for visual tokens (no memory is saved there), decoding computes their scores and
masks them, and attention itself is shortened with SDPA, in a first turn; eager attention, and a second picture turn,
mask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import Schedule, in_tokens
from sparsevlm.methods._computation import BACKENDS, Computation, Removed
from sparsevlm.methods._heads import load_heads
from sparsevlm.methods.base import Method, one_of
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.towers import find_towers

_PROJECTIONS, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class YOPO(Method):
    """YOPO. `budget`: as many multiply-adds as so many visual tokens in every layer; sets `cut`.

    Attributes:
        window: rows and columns that a visual token sees of the visual tokens around it, odd; None = all before it.
        causal_window: it sees only earlier ones (False is the authors' form).
        heads: share of the heads that visual tokens keep, in (0, 1], for the calibrated `mini`; or the file of a mask
            [layers, heads]; None = all.
        ffn: share of each MLP's hidden neurons that visual tokens use, in (0, 1].
        cut: first layer, 0-based, that no visual token reaches; None = none.
        removal: "real" or "masked".
    """

    window: int | None = None
    causal_window: bool = False
    heads: float | str | None = None
    ffn: float = 1.0
    cut: int | None = None
    removal: str = "real"

    name: ClassVar[str] = "yopo"
    reads_text: ClassVar[bool] = False
    keeps_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.removal, ("real", "masked"), "removal")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(f"window {self.window} must be odd: a token in its middle. Use {max(1, self.window - 1)}")
        if self.causal_window and self.window is None:
            raise ValueError("causal_window=True needs a window. Use window=5, say")
        for option in ("heads", "ffn"):
            value = getattr(self, option)
            if isinstance(value, int | float) and not 0 < value <= 1:
                raise ValueError(f"{option} {value} must be a share above 0, at most 1")
        if not isinstance(self.heads, str) and self.heads == 1:
            self._set("heads", None)
        if self.cut is not None and self.cut < 1:
            raise ValueError(f"cut {self.cut} must be 1 or more: the first layer that visual tokens do not reach")
        if self.budget is None:
            return
        if self.removes:
            raise ValueError(
                f"budget={self.budget} and {', '.join(self.removes)} exclude each other: a budget sets cut, and "
                "nothing else. Use one of them"
            )
        if self.budget != "full" and self.removal == "masked":
            raise ValueError('removal="masked" computes everything and can meet no budget. Use removal="real", or cut')

    @property
    def removes(self) -> list[str]:
        """Return the options that remove something."""
        unset = {"window": None, "heads": None, "ffn": 1, "cut": None}
        return [option for option, value in unset.items() if getattr(self, option) != value]

    @property
    def early_drop(self) -> bool:
        """Whether the last layer before the cut computes keys and values of visual tokens only."""
        return self.removes in ([], ["cut"])

    @property
    def rereads(self) -> bool:
        return self.heads is not None or (self.cut is not None and self.removal == "masked")

    # ---- the model -------------------------------------------------------------------------------------------------
    def check(self, family: Family) -> None:
        self._check_cut(family.n_layers)
        if self.window is not None:
            _grid(family, self.name)
        attends = self.window is not None or self.rereads
        backend = family.decoder.config._attn_implementation
        if attends and backend not in BACKENDS:
            raise ValueError(
                f"yopo removes attention with {' or '.join(BACKENDS)} only, not {backend}; call "
                "model.set_attn_implementation('sdpa') first"
            )
        if attends and family.sliding:
            raise ValueError("yopo cannot remove attention of a model with sliding windows. Use ffn, or a real cut")
        if self.removal == "real":
            _check_linear(family, self.heads is not None, self.ffn < 1)

    def _check_cut(self, n_layers: int) -> None:
        if self.cut is not None and self.cut >= n_layers:
            raise ValueError(f"cut {self.cut} does not fit a model of {n_layers} layers. Use 1 ... {n_layers - 1}")

    def attach(self, family: Family) -> Computation:
        n_layers, real = family.n_layers, self.removal == "real"
        mask = None if self.heads is None else load_heads(self.heads, family)
        reach = None if self.window is None else self.window // 2
        end = self.cut if real and self.cut is not None else n_layers
        layers = []
        for i in range(end):
            heads = None if mask is None or mask[i].all() else ~mask[i]
            columns = not real and self.cut is not None and i >= self.cut
            layers.append(Removed(heads, reach, self.causal_window, columns))
        width = family.decoder.config.intermediate_size
        neurons = None if self.ffn == 1 else max(1, int(width * self.ffn + 1e-6))
        grid = _grid(family, self.name) if self.window is not None else None
        return Computation(family, layers, neurons, real, grid)

    def hooks(self, attached: Computation) -> list[RemovableHandle]:
        return attached.install()

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        prefill.attached.starting = prefill

    def forget(self, attached: Computation) -> None:
        attached.starting = attached.call = None

    # ---- the cut ---------------------------------------------------------------------------------------------------
    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        """Return the schedule; of a budget without the model's shape, so that attention's own products do not count."""
        return self._cut(n_visual, n_layers, (1.0, 0.0, 0.0))

    def schedule(self, n_visual: int, n_layers: int, attached: Computation) -> Schedule:
        return self._cut(n_visual, n_layers, _products(attached.family))

    def _cut(self, n_visual: int, n_layers: int, products: tuple[float, float, float]) -> Schedule:
        self._check_cut(n_layers)
        cut = self.cut if self.removal == "real" else None
        if isinstance(self.budget, int):
            cut = solve_cut(in_tokens(self.budget, n_visual), n_visual, n_layers, products)
        if cut is None or cut == n_layers:
            return Schedule(n_visual, n_layers, (), (), (), ())
        return Schedule(n_visual, n_layers, (cut - 1,), (0,), (0,), (0,))

    def score(self, stage: Stage) -> Tensor:
        return torch.zeros(stage.visual_index.shape, device=stage.hidden.device)  # all go


@lru_cache(maxsize=4096)
def solve_cut(budget: int, n_visual: int, n_layers: int, products: tuple[float, float, float]) -> int:
    """Find the layer before which visual tokens cost most nearly what `budget` of them cost in every layer.

    Args:
        products: multiply-adds of a layer per visual token; those of its keys and values alone; and per pair of visual
            tokens. The last layer before the cut computes keys and values only (`early_drop`).

    Returns:
        1 ... n_layers; n_layers = no cut.
    """
    token, key, pair = products
    wanted = n_layers * (budget * token + budget**2 * pair)
    whole, last = n_visual * token + n_visual**2 * pair, n_visual * key
    costs = {cut: (cut - 1) * whole + last for cut in range(1, n_layers)} | {n_layers: n_layers * whole}
    return min(costs, key=lambda cut: abs(costs[cut] - wanted))


def _products(family: Family) -> tuple[float, float, float]:
    """Return `products` of `solve_cut` for a model's layers."""
    c = family.decoder.config
    head = family.decoder.layers[0].self_attn.head_dim
    queries, keys = head * c.num_attention_heads, head * c.num_key_value_heads
    per_token = 2 * c.hidden_size * (queries + keys) + 3 * c.hidden_size * c.intermediate_size
    return float(per_token), float(2 * c.hidden_size * keys), float(2 * queries)


def _grid(family: Family, name: str) -> int | None:
    """Return the visual tokens of a picture; None = unknown (text models: each run of visual tokens is a picture).

    Raises:
        ValueError: they form no square grid.
    """
    if not family.visual_ids:
        return None
    tokens = sorted({tower.tokens for tower in find_towers(family, name)})
    if len(tokens) > 1 or isqrt(tokens[0]) ** 2 != tokens[0]:
        found = ", ".join(map(str, tokens))
        raise ValueError(
            f"window needs pictures whose tokens form a square grid; this model's have {found} tokens (with CLS?). Use "
            "window=None"
        )
    return tokens[0]


def _check_linear(family: Family, heads: bool, ffn: bool) -> None:
    """Raise ValueError if projections (`heads`) or MLPs (`ffn`) that shall be sliced are no plain linear layers."""
    for layer in family.decoder.layers:
        modules = [getattr(layer.self_attn, name, None) for name in _PROJECTIONS if heads]
        modules += [getattr(layer.mlp, name, None) for name in _MLP if ffn]
        if any(type(module) is not nn.Linear for module in modules):
            raise ValueError(
                'removal="real" slices plain linear layers, and this model has others (adapters, quantised?). Merge '
                'the adapters, or use removal="masked"'
            )
