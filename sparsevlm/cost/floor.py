"""The least that a pruned prefill can cost in plain form: the same layers on the same lengths, decided for free.

A method's overhead is its prefill's time over the floor's, in the same run. A method that drops early (see
`runtime.early`) can be below 1: it computes fewer rows in the pruning layers than the floor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsevlm.runtime.families import locate
from sparsevlm.runtime.trace import PrefillRecord


def lengths_after(record: PrefillRecord) -> dict[int, int]:
    """Sequence length from each layer on that follows a pruning point, of a traced prefill without padding.

    Raises:
        ValueError: samples of different lengths; the floor is defined for equal ones.
    """
    if len({*record.n_tokens}) != 1 or any(len({*s.tokens_out}) != 1 for s in record.stages):
        raise ValueError("the floor needs samples of equal length that keep equally many tokens")
    text = record.n_tokens[0] - record.n_visual[0]
    return {s.layer + 1: text + s.tokens_out[0] for s in record.stages if s.tokens_out != s.tokens_in}


@contextmanager
def floor(model: nn.Module, lengths: Mapping[int, int]) -> Iterator[None]:
    """Cut the sequence to `lengths[i]` rows before layer i, in every prefill without padding inside the block.

    Which rows stay is known (the last ones) and costs one gather, as any known choice would.
    """
    family = locate(model)
    handles, state = [], {}

    def before(i: int, layer: nn.Module, args: tuple, kwargs: dict):
        hidden = args[0]
        if i == 0:
            state.clear()
        if hidden.shape[1] == 1:  # a decode step
            return None
        if i in lengths and hidden.shape[1] > lengths[i]:
            index = torch.arange(hidden.shape[1] - lengths[i], hidden.shape[1], device=hidden.device)
            hidden = hidden.index_select(1, index)
            state["rope"] = tuple(t[:, : lengths[i]] for t in kwargs["position_embeddings"])
        if not state:
            return None
        own: dict[str, Tensor | tuple | None] = {
            "attention_mask": None,
            "position_ids": None,
            "position_embeddings": state["rope"],
        }
        return (hidden, *args[1:]), {**kwargs, **own}

    try:
        for i, layer in enumerate(family.decoder.layers):
            handles.append(layer.register_forward_pre_hook(functools.partial(before, i), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
