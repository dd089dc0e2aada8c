"""FOLDER (arXiv 2501.02430, ICCV 2025): merge everything at once, in the last block of the vision tower that is read.

Between attention and MLP of that block:
1. similarity = cosine of the keys (mean over heads); tokens are dealt alternately into A (even) and B (odd);
2. every A token proposes its most similar B token; a proposal is worth the similarity less 100 alpha times the CLS
   attention (softmaxed, mean over heads) of the A token; CLS never merges;
3. the best proposals are merged by a mean weighted with the patches each token stands for;
4. one pass can remove only half; the sequence is folded again, with merged keys and averaged attention, until T are
   left.
The language model gets the unmerged A tokens in their order, then B, as in the authors' code.

Source: the complete variant of the authors' code, llava/model/folder of their repository (d4750b9; no licence, nothing
of it was used), with alpha 5 for LLaVA and 0 for video; raw keys are merged, weighted like the tokens, and normalised
inside each pass. Their simplified variant is `folder_simple`. Deviations: the authors' knob is r = removed / 24 blocks
(16 for 192 tokens); here any T, with alpha = 5 everywhere. Their code fails (TypeError) where fewer than 40 tokens,
CLS included, go into a pass (T = 32; not T = 36, whose last pass starts from 73); ours has no such limit. Frames of a
video share its budget; ties go by index. The tower's other blocks are untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.core.merging import match, merge_mean, most_removable
from sparsevlm.methods._blocks import BlockMethod
from sparsevlm.runtime.blocks import Blocks, Tokens
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.vision import Tower, cls_row, mean_heads


@dataclass(frozen=True)
class Folder(BlockMethod):
    """One folding block.

    Attributes:
        alpha: weight of the CLS attention; None = 5 for images, 0 for videos, as the authors have it.
    """

    alpha: float | None = None

    name: ClassVar[str] = "folder"

    def layers(self, tower: Tower) -> range:
        return range(tower.layer, tower.layer + 1)

    def block(self, run: Blocks, i: int, layer: Network, tokens: Tokens) -> None:
        alpha = {"image": 5.0, "video": 0.0}[run.tower.kind] if self.alpha is None else self.alpha
        tokens.x = run.attend(layer, tokens)
        assert tokens.keys is not None and tokens.queries is not None  # `attend` has kept them
        metric = mean_heads(tokens.keys, layer.self_attn)
        attention = cls_row(layer.self_attn, tokens.queries, tokens.keys).mean(1)
        while (now := tokens.x.shape[1]) > tokens.count + 1:
            r = min(now - tokens.count - 1, most_removable(now, True))
            pairs = match(metric, r, penalty=100 * alpha * attention)
            metric = merge_mean(metric, pairs, tokens.size)
            attention = merge_mean(attention[..., None], pairs)[..., 0]
            tokens.merge(pairs)
        tokens.x = run.mlp(layer, tokens.x)
