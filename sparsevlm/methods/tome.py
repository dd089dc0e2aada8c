"""ToMe (arXiv 2210.09461, ICLR 2023): token merging in every block of the vision tower.

In each block up to the one whose output the language model reads, between attention and MLP:
1. tokens are dealt alternately into A and B; every A token proposes the B token whose key (mean over heads) is closest
   by cosine; the r best proposals are merged by a mean weighted with the patches that each token stands for;
2. CLS never merges;
3. attention adds log(size) to the logits of a key (proportional attention): a merged token counts as its patches.

r is spread evenly over the blocks, floors and ceilings in turn, so that exactly T tokens are left (LLaVA-1.5, 23
blocks: 16.7, 19.5, 22.3 per block for 192, 128, 64). One pass can at most halve: in towers of few blocks earlier ones
do what the last ones cannot, and for budgets below tokens / 2^blocks the first block makes several passes.

Source: the paper; the authors' code (CC-BY-NC) was not used. It was made for image classifiers; the order in which its
blocks leave the tokens (unmerged A, then B) is the order in which the language model gets them here. Deviations: none
in the blocks; ties go by index. Frames of a video share its budget and merge within themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsevlm.core.merging import match, merge_mean, merge_schedule, most_removable
from sparsevlm.methods._blocks import BlockMethod
from sparsevlm.runtime.blocks import Blocks, Tokens
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.network import Network
from sparsevlm.runtime.vision import Tower, find_towers, mean_heads


@dataclass(frozen=True)
class ToMe(BlockMethod):
    """Token merging.

    Attributes:
        proportional: proportional attention.
    """

    proportional: bool = True

    name: ClassVar[str] = "tome"

    def check(self, family: Family) -> None:
        for tower in find_towers(family, self.name):
            backend = tower.module.config._attn_implementation
            if self.active and self.proportional and backend not in ("sdpa", "eager"):
                raise ValueError(
                    f"proportional attention of 'tome' adds to the attention logits, which {backend!r} cannot. Call "
                    "model.set_attn_implementation({'vision_config': 'sdpa'}) first, or set proportional=False"
                )

    def layers(self, tower: Tower) -> range:
        return range(tower.layer + 1)

    def block(self, run: Blocks, i: int, layer: Network, tokens: Tokens) -> None:
        tower = run.tower
        bias = tokens.size.log()[..., 0] if self.proportional and tokens.size is not None else None
        tokens.x = run.attend(layer, tokens, bias)
        left = tokens.x.shape[1] - merge_schedule(tower.patches, tokens.count, tower.layer + 1)[i]
        assert tokens.keys is not None  # `attend` has kept them
        metric = mean_heads(tokens.keys, layer.self_attn)
        while (now := tokens.x.shape[1]) > left:
            pairs = match(metric, min(now - left, most_removable(now, True)))
            metric = merge_mean(metric, pairs, tokens.size)
            tokens.merge(pairs)
        tokens.x = run.mlp(layer, tokens.x)
