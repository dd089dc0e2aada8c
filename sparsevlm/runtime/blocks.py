"""Computing encoder layers of a CLIP tower anew, for methods that change the tokens between attention and MLP.

Hooks cannot reach between the two halves of a layer, so the layer itself is given one token to compute, and its forward
hook returns what the method makes with the layer's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.core.merging import Matching, merge_mean, merge_sum, survivors
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.vision import Encoding, Reduced, Tower, Vision


@dataclass
class Tokens:
    """Pictures that end with the same number of tokens, on their way through the tower.

    Attributes:
        count: visual tokens that shall be left.
        x: [n, 1 + t, d] states, CLS first.
        index: [n, 1 + t] int64, places in the full sequence (0 = CLS).
        size: [n, 1 + t, 1] float32, patches merged into each; None = one each.
        queries, keys: [n, 1 + t, d] raw projections of the layer computed last.
        scratch: what a method remembers from layer to layer.
    """

    count: int
    x: Tensor
    index: Tensor
    size: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)

    def merge(self, matching: Matching) -> None:
        """Merge pairs by the mean over all patches they stand for."""
        size = torch.ones_like(self.x[..., :1], dtype=torch.float32) if self.size is None else self.size
        self.x = merge_mean(self.x, matching, size)
        self.size = merge_sum(size, matching)
        self.index = survivors(self.index, matching)


class Blocks:
    """Hooks that let `method.block(self, layer index, layer, tokens)` compute the given layers of a tower."""

    def __init__(self, method, vision: Vision, tower: Tower, layers: range):
        self.method, self.vision, self.tower, self.layers = method, vision, tower, layers
        self.tokens: list[Tokens] = []
        self.whole: Tensor | None = None  # input of a layer whose call has been given one token
        self.projected: dict[str, Tensor] = {}

    def handles(self) -> list[RemovableHandle]:
        out = []
        for i in self.layers:
            layer = self.tower.module.encoder.layers[i]
            out.append(layer.register_forward_pre_hook(partial(self._before, i), with_kwargs=True))
            out.append(layer.register_forward_hook(partial(self._after, i)))
            for name in ("q_proj", "k_proj"):
                out.append(getattr(layer.self_attn, name).register_forward_hook(partial(self._keep, name)))
        return out

    def _keep(self, name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.projected[name] = out

    def _before(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        encoding: Encoding = self.vision.encoding
        if not encoding.groups:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if i == self.layers[0]:
            index = torch.arange(x.shape[1], device=x.device)
            self.tokens = [
                Tokens(encoding.counts[g[0]], x if len(encoding.groups) == 1 else x[g], index.expand(len(g), -1))
                for g in encoding.groups
            ]
        # a single token, not none: FlashAttention knows no empty sequences
        return ((x[:, :1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x[:, :1]})

    def _after(self, i: int, layer: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if not self.vision.encoding.groups:
            return None
        for tokens in self.tokens:
            if tokens.count == 0:
                continue  # a frame that gets no token
            if tokens.count < self.tower.patches:
                with part("pictures"):
                    self.method.block(self, i, layer, tokens)
            else:
                tokens.x = self.mlp(layer, self.attend(layer, tokens))
        return self.tokens[0].x if len(self.tokens) == 1 else out

    def attend(self, layer: nn.Module, tokens: Tokens, bias: Tensor | None = None) -> Tensor:
        """The first half of a layer, x + attention(norm(x)); `bias` [n, 1 + t] is added to the logits of each key."""
        mask = None if bias is None else bias[:, None, None].to(tokens.x.dtype)
        with part(None):  # the tower's work
            x = tokens.x + layer.self_attn(hidden_states=layer.layer_norm1(tokens.x), attention_mask=mask)[0]
        tokens.queries, tokens.keys = self.projected.pop("q_proj"), self.projected.pop("k_proj")
        return x

    def mlp(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The second half, x + mlp(norm(x))."""
        with part(None):  # the tower's work
            return x + layer.mlp(layer.layer_norm2(x))

    def reduced(self) -> list[Reduced]:
        """What is left, per group; CLS only where nothing was to be dropped of features that contain it."""
        out = []
        for tokens in self.tokens:
            x, origin = tokens.x, tokens.index - 1 + self.tower.cls
            if tokens.count < self.tower.tokens or not self.tower.cls:
                x, origin = x[:, 1:], origin[:, 1:]
            out.append(Reduced(x[:, : tokens.count], origin[:, : tokens.count]))
        self.tokens = []
        return out
