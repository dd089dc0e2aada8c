"""Removing computation of visual tokens while all of them stay: what is installed in a model (YOPO).

Attention is reached through a function that is registered with transformers' AttentionInterface and set in the text
model's configuration for the block; projections and MLPs through hooks, as everywhere here. The two forms:

- masked, as YOPO's authors have it: everything is computed. Values of visual keys, outputs and hidden neurons are set
  to zero, which is the same as zeroing attention after the softmax: the removed keys stay in its denominator.
- real: what is removed is not computed. Keys that a head does not see are outside its softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsevlm.methods._grids import Grids, attend, attend_in_bands
from sparsevlm.runtime.cache_state import cached_length, state_of, static_length
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill

BACKENDS = ("sdpa", "eager")
_PREFIX, _OWNER = "sparsevlm_", "_sparsevlm_computation"


@dataclass
class Call:
    """What attention must know of the call being made.

    Attributes:
        visual: [B, past + L or fewer] bool, keys that are visual tokens; later ones are text.
        grids: visual rows of this call; None = it brings none.
        past: keys of earlier calls, where it brings some.
    """

    visual: Tensor
    grids: Grids | None
    past: int = 0

    def columns(self, keys: int, device: torch.device) -> Tensor:
        """[B, keys] bool, which keys are visual tokens."""
        visual = self.visual.to(device)[:, :keys]
        return F.pad(visual, (0, keys - visual.shape[1]))


@dataclass
class Removed:
    """What is removed in one layer.

    Attributes:
        heads: [H] bool, query heads that are removed for visual tokens; None = none.
        reach: rows and columns of the grid that a visual token sees to each side; None = all before it.
        causal: whether it sees only earlier ones among them.
        columns: visual tokens are seen by nobody (masked form of the layer cut).
    """

    heads: np.ndarray | None
    reach: int | None
    causal: bool
    columns: bool

    @property
    def any(self) -> bool:
        return self.heads is not None or self.reach is not None or self.columns

    def kept(self, groups: int = 1) -> list[int]:
        """Heads that stay; with `groups` the key heads that any of so many query heads reads."""
        return np.flatnonzero((~self.heads).reshape(-1, groups).any(1)).tolist()


class Computation:
    """One method in one model.

    Attributes:
        layers: what is removed in each layer that is touched.
        neurons: hidden neurons of an MLP that visual tokens keep; None = all.
        starting: the prompt that is about to enter layer 0; call: of the call being made.
    """

    def __init__(self, family: Family, layers: list[Removed], neurons: int | None, real: bool, grid: int | None):
        self.family, self.layers, self.neurons, self.real, self.grid = family, layers, neurons, real, grid
        self.starting: Prefill | None = None
        self.call: Call | None = None
        self.whole: dict[nn.Module, Tensor] = {}  # inputs of modules that compute a part of the rows

    @property
    def marks_keys(self) -> bool:
        """Whether later calls must know which keys are visual tokens."""
        return any(removed.heads is not None or removed.columns for removed in self.layers)

    # ---- installing ------------------------------------------------------------------------------------------------
    def install(self) -> list[RemovableHandle]:
        decoder = self.family.decoder
        if not any(removed.any for removed in self.layers) and self.neurons is None:
            return []
        handles: list = [decoder.layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        for layer, removed in zip(decoder.layers, self.layers, strict=False):
            if self.real and removed.heads is not None:
                handles += self._slice_heads(layer.self_attn, removed)
            if self.neurons is not None:
                handles += self._cut_neurons(layer.mlp)
        if any(removed.any for removed in self.layers):
            handles.append(_Attention(self))
        return handles

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before layer 0: note which keys are visual, of this call and of what the cache holds."""
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        prefill, self.starting, self.call = self.starting, None, None
        self.whole.clear()
        state = getattr(cache, "sparsevlm", None)
        earlier = None if state is None else state.visual
        if earlier is not None and static_length(cache, 0) is None:
            earlier = state.visual = earlier[:, : cached_length(cache, 0)]  # the cache may have been cropped
        if prefill is None:
            self.call = None if earlier is None else Call(earlier, None)
            return
        grids, past = Grids(prefill.prompt.visual, hidden.device), cached_length(cache, 0)
        if self.layers[0].reach is not None:
            grids.find_pictures(self.grid)
        visual = grids.flag
        if past:
            before = visual[:, :0] if earlier is None else earlier.to(visual.device)
            visual = torch.cat([F.pad(before, (0, past - before.shape[1])), visual], 1)
        self.call = Call(visual, grids, past)
        if cache is not None and self.marks_keys:
            state_of(cache).visual = visual

    # ---- projections and MLPs --------------------------------------------------------------------------------------
    def _slice_heads(self, attention: nn.Module, removed: Removed) -> list[RemovableHandle]:
        """Visual rows get no queries, keys, values and outputs of removed heads (zeros)."""
        width = attention.head_dim
        groups = attention.num_key_value_groups
        queries, keys = (_entries(removed.kept(n), width) for n in (1, groups))

        def rows_of(linear: nn.Linear, index: Tensor, x: Tensor) -> Tensor:
            index = index.to(x.device)
            bias = None if linear.bias is None else linear.bias[index]
            made = F.linear(x, linear.weight[index], bias)
            return made.new_zeros(len(x), linear.out_features).index_copy(1, index, made)

        def columns_of(linear: nn.Linear, x: Tensor) -> Tensor:
            index = queries.to(x.device)
            return F.linear(x[:, index], linear.weight[:, index], linear.bias)

        handles = []
        for linear, index in ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)):
            handles += self._in_two(linear, partial(rows_of, linear, index))
        return handles + self._in_two(attention.o_proj, partial(columns_of, attention.o_proj))

    def _cut_neurons(self, mlp: nn.Module) -> list[RemovableHandle]:
        """Visual rows use the first neurons only."""
        if not self.real:
            return [mlp.down_proj.register_forward_pre_hook(self._zero_neurons)]

        def first_neurons(x: Tensor) -> Tensor:
            gate, up = (
                F.linear(x, p.weight[: self.neurons], None if p.bias is None else p.bias[: self.neurons])
                for p in (mlp.gate_proj, mlp.up_proj)
            )
            return F.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight[:, : self.neurons], mlp.down_proj.bias)

        return self._in_two(mlp, first_neurons)

    def _zero_neurons(self, module: nn.Module, args: tuple) -> tuple | None:
        grids = self._grids()
        if grids is None:
            return None
        late = torch.arange(args[0].shape[-1], device=args[0].device) >= self.neurons
        return (args[0].masked_fill(grids.flag.to(args[0].device)[..., None] & late, 0),)

    def _in_two(self, module: nn.Module, visual: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        """Let `module` compute the rows of text only, and `visual` [n, D_in] -> [n, D_out] the others."""

        def before(module: nn.Module, args: tuple) -> tuple | None:
            grids = self._grids()
            if grids is None:
                return None
            self.whole[module] = x = args[0]
            return (x.flatten(0, 1)[grids.text_rows.to(x.device)][None],)

        def after(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            grids, x = self._grids(), self.whole.pop(module, None)
            if x is None:
                return None
            text, rows = grids.text_rows.to(x.device), grids.visual_rows.to(x.device)
            full = out.new_zeros(x.shape[0] * x.shape[1], out.shape[-1]).index_copy(0, text, out[0])
            return full.index_copy(0, rows, visual(x.flatten(0, 1)[rows])).unflatten(0, x.shape[:2])

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _grids(self) -> Grids | None:
        return None if self.call is None else self.call.grids

    # ---- attention -------------------------------------------------------------------------------------------------
    def attend(self, kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, **options):
        """In place of the backend `kind`; arguments and result as transformers has them."""
        original = _backend(kind, module)
        removed = self.layers[module.layer_idx] if module.layer_idx < len(self.layers) else None
        call = self.call
        if call is None or removed is None or not removed.any:
            return original(module, query, key, value, mask, **options)
        if call.grids is None and removed.heads is None and not removed.columns:  # a window is for visual rows
            return original(module, query, key, value, mask, **options)
        if module.num_key_value_groups > 1:
            key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        original = partial(original, _UngroupedHeads(module.training))
        plain = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
        if self.real and kind == "sdpa" and call.grids is not None and not call.past and plain:
            return self._apart(original, removed, query, key, value, mask, **options), None
        gone = None if removed.heads is None else torch.from_numpy(removed.heads).to(query.device)
        columns = call.columns(key.shape[2], query.device)[:, None, None]
        if call.grids is not None and removed.reach is not None:
            mask = call.grids.windowed(mask, removed.reach, removed.causal, query, key, call.past)
        if not self.real:
            hidden = columns if removed.columns else columns & gone[:, None, None] if gone is not None else None
            if hidden is not None:
                value = value.masked_fill(hidden.mT, 0)
        elif gone is not None:
            mask = _hide(mask, columns & gone[:, None, None], call.grids, query)
        out, weights = original(query, key, value, mask, **options)
        if call.grids is not None and gone is not None:  # [B, L, H, d]
            out = out.masked_fill(call.grids.flag.to(out.device)[..., None, None] & gone[:, None], 0)
        return out, weights

    def _apart(self, original, removed: Removed, query, key, value, mask, **options) -> Tensor:
        """[B, L, H, d]: heads that stay for all rows, and removed ones for text among text."""
        grids, length = self.call.grids, query.shape[2]
        key, value = key[:, :, :length], value[:, :, :length]  # a static cache has room for more
        mask = mask if mask is None else mask[..., :length]
        banded = removed.reach is not None and 2 * removed.reach + 1 < min(p.side for p in grids.pictures)
        if removed.reach is not None and not banded:
            mask = grids.windowed(mask, removed.reach, removed.causal, query, key, 0)

        def stay(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if banded:
                return attend_in_bands(grids, removed.reach, removed.causal, query, key, value, mask, **options)
            return original(query, key, value, mask, **options)[0].transpose(1, 2)

        if removed.heads is None:
            return stay(query, key, value).transpose(1, 2)
        out = torch.zeros_like(query)
        for heads, run in ((removed.kept(), stay), (np.flatnonzero(removed.heads).tolist(), None)):
            if heads:
                index = torch.tensor(heads, device=query.device)
                q, k, v = (x.index_select(1, index) for x in (query, key, value))
                made = attend(grids, q, k, v, mask, text_only=True, **options) if run is None else run(q, k, v)
                out = out.index_copy(1, index, made)
        return out.transpose(1, 2)


def _entries(heads: list[int], width: int) -> Tensor:
    """Rows of a projection that belong to the given heads."""
    return (torch.tensor(heads, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


def _hide(mask: Tensor | None, hidden: Tensor, grids: Grids | None, query: Tensor) -> Tensor:
    """`mask` [B, 1, L, S] or None, without the keys `hidden` [B, H, 1, S] in rows that are no visual tokens."""
    if grids is not None:  # rows of visual tokens see something: their output is set to zero
        hidden = hidden & ~grids.flag.to(query.device)[:, None, :, None]
    if mask is None:  # one row that sees everything
        return ~hidden
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


class _UngroupedHeads(nn.Module):
    """Stands in for the attention module where keys are there for every query head."""

    num_key_value_groups, is_causal = 1, True

    def __init__(self, training: bool):
        super().__init__()
        self.training = training


# ---- transformers' interface -----------------------------------------------------------------------------------------
class _Attention:
    """Sets the registered function while it is installed; `remove` puts back what was there."""

    def __init__(self, computation: Computation):
        self.config = computation.family.decoder.config
        self.modules = [layer.self_attn for layer in computation.family.decoder.layers]
        self.before = self.config._attn_implementation
        for module in self.modules:
            module.__dict__[_OWNER] = computation
        self.config._attn_implementation = _PREFIX + self.before

    def remove(self) -> None:
        self.config._attn_implementation = self.before
        for module in self.modules:
            del module.__dict__[_OWNER]


def _backend(kind: str, module: nn.Module) -> Callable:
    """The function of transformers that `kind` stands for."""
    if kind == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[kind]


def _registered(kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, **options):
    """The registered function: of a module in which nothing is installed (its configuration is shared) the backend."""
    owner = module.__dict__.get(_OWNER)
    attend = _backend(kind, module) if owner is None else partial(owner.attend, kind)
    return attend(module, query, key, value, mask, **options)


for _kind in BACKENDS:
    AttentionInterface.register(_PREFIX + _kind, partial(_registered, _kind))
    AttentionMaskInterface.register(_PREFIX + _kind, ALL_MASK_ATTENTION_FUNCTIONS[_kind])
