"""The question of a prompt: its text after the last picture."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from sparsevlm.runtime.families import Family


class Question:
    """Reads the text of a prompt's ids after its last visual token, without a final "ASSISTANT:"."""

    def __init__(self, tokenizer: Any, visual_ids: tuple[int, ...]):
        self.tokenizer, self.visual_ids = tokenizer, visual_ids

    def __call__(self, ids: Tensor) -> str:
        text = self.tokenizer.decode(after_picture(ids, self.visual_ids), skip_special_tokens=True)
        return re.sub(r"\s*assistant\s*:\s*$", "", text, flags=re.IGNORECASE).strip()

    @classmethod
    def of(cls, family: Family) -> Question | None:
        """Return the reader of a model, with the tokenizer in the folder that it was loaded from; None without one."""
        from transformers import AutoTokenizer

        folder = family.outer.config._name_or_path
        return cls(AutoTokenizer.from_pretrained(folder), family.visual_ids) if folder else None


def after_picture(ids: Tensor, visual_ids: tuple[int, ...]) -> list[int]:
    """Return those of a prompt's ids [L] that come after its last visual token."""
    row = ids.tolist()
    last = max((i for i, token in enumerate(row) if token in visual_ids), default=-1)
    return row[last + 1 :]
