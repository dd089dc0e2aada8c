"""FOLDER's simplified form (arXiv 2501.02430, the authors' folder.py), which their README recommends for comparisons.

It merges what the projector makes, wherever that comes from:
1. tokens are dealt alternately into A and B; every A token proposes the B token that is closest by cosine; the best
   proposals are merged by a mean weighted with the tokens that each one stands for;
2. one pass can remove (n - 1) / 2 of n tokens; the sequence is folded again until T are left;
3. at the end every token is multiplied by 1 + log(tokens that it stands for).
Tokens come in spatial order, a merged one at the place of its B token.

There is no CLS attention, no key and no block of the tower in it: with `folder` it shares the folding only.

Source: `merge_features` of the repository (d4750b9, no licence; nothing of it was used), called after the projector and
without a class token, as in the authors' examples for VILA and VITA. Deviations: T is given, not r; theirs cannot go
below two tokens; pictures of a prompt share the budget and merge within themselves; of features that contain CLS, that
is dropped first; ties go by index; similarities, means and the factor are computed in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsevlm.core.merging import match, merge_mean, merge_sum, survivors
from sparsevlm.core.packing import take
from sparsevlm.methods._vision import VisionMethod
from sparsevlm.runtime.vision import Pictures, Reduced


@dataclass(frozen=True)
class FolderSimple(VisionMethod):
    """Folding of projected tokens."""

    name: ClassVar[str] = "folder_simple"
    after_projector: ClassVar[bool] = True

    def reduce(self, pictures: Pictures, count: int) -> Reduced:
        cls, features = int(pictures.tower.cls), pictures.features
        x = features[:, cls:].to(torch.promote_types(features.dtype, torch.float32))
        size = torch.ones_like(x[..., :1])
        index = torch.arange(cls, features.shape[1], device=x.device).expand(x.shape[0], -1)
        while (now := x.shape[1]) > count:
            pairs = match(x, min(now - count, max((now - 1) // 2, 1)), protect_first=False)
            index = survivors(index, pairs)
            order = index.argsort(1)
            x, size, index = (take(t, order) for t in (merge_mean(x, pairs, size), merge_sum(size, pairs), index))
        return Reduced((x * (1 + size.log())).to(features.dtype), index)
