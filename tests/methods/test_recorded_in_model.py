"""Methods inside the language model against recordings of their authors' code (tests/goldens/peers2), in float64.

FiCoCo-L's code takes the first 576 tokens of any prompt for the picture; so does the mask given here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from sparsevlm.methods import dart as dart_module
from tests.goldens import peers2, recipe
from tests.goldens.load import SHIPPED, files, recording, stem

pytestmark = pytest.mark.recordings
LOGITS = 1e-5


@torch.no_grad()
def run(meta: dict, method, start: int):
    """The record, the cached tokens per layer and the last token's logits of a prompt with its picture at `start`."""
    model = peers2.llama(meta["config"], meta["seed"])
    shape = meta["pre"], meta["n_vis"], meta["n_text"]
    recipe.CONFIGS.setdefault("E", peers2.peers2_recipe.LLAMAS["E"])
    embeds = torch.from_numpy(recipe.inputs_embeds(meta["config"], meta["seed"], *shape)).double()
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + meta["n_vis"]] = True
    with method(model, visual_mask=visual) as trace:
        out = model(inputs_embeds=embeds, use_cache=True)
    return trace.prefills[0], [layer.keys.shape[2] for layer in out.past_key_values.layers], out.logits[0, -1]


@pytest.mark.parametrize("path", files("peers2", "ficoco_l_*.npz"), ids=stem)
def test_ficoco_l(path: Path):
    meta, want = recording(path)
    method = sparsevlm.build("ficoco_l", variant="code", r=meta["r"], start=meta["first_layer"])
    record, cached, logits = run(meta, method, 0)
    origin = np.arange(meta["n_vis"])
    for stage, gone in zip(record.stages, want["gone"], strict=False):
        assert sorted(set(origin) - set(stage.origin[0].tolist())) == sorted(gone.tolist())
        origin = stage.origin[0].numpy()
    last = want["gone"][len(record.stages) :]  # of the last layer, where ours discards nothing
    assert len(last) == (len(want["gone"]) == len(cached) - meta["first_layer"])
    assert sorted([*want["kept"].tolist(), *last.flatten().tolist()]) == origin.tolist()
    assert cached == want["kv_len"].tolist()
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=LOGITS)


def dart(path: Path, monkeypatch, order: list[int] | None = None):
    """A run of DART; `order`: which of our pivots (visual, then text, by position) comes first, second, ..."""
    meta = recording(path)[0]
    seen = {}

    def least_similar(visual, pivots, shares, free, chosen):
        seen["visual"] = chosen[0].nonzero()[:, 0].tolist()
        assert len({*shares[0].tolist()}) == 1  # as many tokens for every pivot, as the authors have it
        return original(visual, pivots if order is None else pivots[:, order], shares, free, chosen)

    original = dart_module.least_similar
    monkeypatch.setattr(dart_module, "least_similar", least_similar)
    record, cached, logits = run(meta, sparsevlm.build("dart", k=meta["K"], keep=meta["budget"]), meta["pre"])
    monkeypatch.undo()
    return record.stages[0].kept[0].tolist(), cached, logits, seen["visual"]


@pytest.mark.parametrize("path", files("peers2", "dart_*.npz"), ids=stem)
def test_dart_in_the_order_of_the_authors_set(path: Path, monkeypatch):
    meta, want = recording(path)
    places = [*(sorted(want["pivots_visual"]) + np.array(meta["pre"]))]
    places += [*(sorted(want["pivots_text"]) + np.array(meta["pre"] + meta["n_vis"]))]
    kept, cached, logits, visual = dart(path, monkeypatch, [places.index(p) for p in want["pivot_order"]])
    assert visual == sorted(want["pivots_visual"].tolist())
    assert kept == want["kept"].tolist()
    assert cached == want["kv_len"].tolist()
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=LOGITS)


def test_dart_in_our_order_keeps_as_many_others(monkeypatch):
    differ = 0
    for path in sorted((SHIPPED / "peers2").glob("dart_*.npz")):
        want = recording(path)[1]["kept"].tolist()
        kept, *_, visual = dart(path, monkeypatch)
        assert len(kept) == len(want) and {*visual} <= {*kept} & {*want}
        differ += kept != want
    assert differ
