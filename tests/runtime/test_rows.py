"""A block of visual tokens is sliced, scattered ones are gathered: the same rows, wherever the caller sees them."""

from __future__ import annotations

import pytest
import torch

import sparsevlm
from sparsevlm.runtime import prefill, rows
from tests.tiny import EARLY_DROP, inputs, llava, same


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("recycled_at", ["end", "centre"])
@pytest.mark.parametrize("positions", ["renumber", "original"])
@torch.no_grad()
def test_block_and_scattered_rows_give_the_same_full_output(recycled_at, positions, options, monkeypatch):
    model = llava()
    x, _ = inputs("one", model)
    method = sparsevlm.build(
        "sparsevlm", layers=(1, 3), keep=(14, 6), recycle=0.7, cluster=0.2, recycled_at=recycled_at,
        positions=positions, **options,
    )  # fmt: skip
    outputs, traces, kinds, made = [], [], [], prefill.first_rows

    def first_rows(prompt, numbers):
        found = made(prompt, numbers)
        found = found.scattered() if outputs else found
        kinds.append(type(found))
        return found

    monkeypatch.setattr(prefill, "first_rows", first_rows)
    for _ in range(2):
        with method(model) as trace:
            outputs.append(model.model(**x).last_hidden_state)
        traces.append(trace.prefills[0])
    assert kinds == [rows.Block, rows.Scattered]
    same(*outputs)
    left = x["input_ids"].shape[1] - 36 + traces[0].stages[-1].tokens_out[0]
    assert (outputs[0][0] != 0).any(-1).sum() == left  # each row that is left has a place of its own
    for a, b in zip(*(t.stages for t in traces), strict=True):
        assert a.kept[0].tolist() == b.kept[0].tolist() and a.origin[0].tolist() == b.origin[0].tolist()
        assert a.recycled[0] > 1
