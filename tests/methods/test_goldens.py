"""Parity with recorded runs of the authors' code, see tests/goldens/README.md.

Where a later stage forms two clusters (budget 64), densities of mutual neighbours tie, and the order of two equal
centres is whatever torch.topk did when the run was recorded; ours is by index. `test_recorded_run` compares these runs
up to the two merged tokens of the first such stage, in either order, and the lengths everywhere. Runs with the authors'
noise (`_noise`) are repeated with the recorded draws: the restatement's clustering then takes the place of ours, which
has none. Of a run that rounding alone would change (meta's `stable` is 0) only the raters and the first scores count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sparsevlm
from tests import restatement
from tests.goldens.load import SHIPPED, files, recorded_model_and_prompt, recording, stem
from tests.tiny import EARLY_DROP

SCORES, LOGITS = 1e-5, 5e-5
pytestmark = pytest.mark.recordings


def method_of(meta: dict, **options) -> sparsevlm.methods.Method:
    """The method and options that a recording corresponds to."""
    layers = tuple(meta["pruning_loc"])
    if meta["branch"] == "video":
        return sparsevlm.build("sparsevlm_rank", rule="video", layers=layers, **options)
    if meta["branch"] == "v10":
        options |= {"rule": "v1.0", "scale": meta["scale"], "bias": meta["bias"], "layers": layers}
        return sparsevlm.build("sparsevlm_rank", **options)
    if meta["use_version"] == "2_0":
        return sparsevlm.build("sparsevlm_plus", layers=layers, keep=meta["keep_list"], **options)
    few = meta["n_vis"] < 576  # the authors' code drops one token where nothing need be dropped
    return sparsevlm.build("sparsevlm", layers=layers, keep=meta["keep_list"], always_drop=few, **options)


@dataclass
class Watch:
    """What enters each layer of the prefill: states [L, D] and cos, sin of their positions [L, d]."""

    states: dict[int, Tensor] = field(default_factory=dict)
    rope: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def install(self, model) -> list:
        return [
            layer.register_forward_pre_hook(self._hook(i), with_kwargs=True)
            for i, layer in enumerate(model.model.layers)
        ]

    def _hook(self, i: int):
        def hook(module, args, kwargs):
            if i not in self.states:  # the first call is the prefill
                self.states[i] = (args[0] if args else kwargs["hidden_states"])[0]
                self.rope[i] = tuple(t[0] for t in kwargs["position_embeddings"])

        return hook


@dataclass
class Run:
    meta: dict
    recorded: dict
    record: object
    watch: Watch
    cached: list[int]
    ids: list[int]
    logits: Tensor
    rotary: torch.nn.Module


@torch.no_grad()
def run(path: Path, **options) -> Run:
    meta, recorded = recording(path)
    model, embeds, visual = recorded_model_and_prompt(meta)
    watch, steps = Watch(), len(recorded["gen_ids"])
    with method_of(meta, **options)(model, visual_mask=visual) as trace:
        handles = watch.install(model)  # after ours: sees what the layers see
        try:
            out = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(visual, dtype=torch.long),
                max_new_tokens=steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        finally:
            for handle in handles:
                handle.remove()
    cached = [layer.keys.shape[2] - (steps - 1) for layer in out.past_key_values.layers]
    ids, logits = out.sequences[0].tolist(), torch.stack(out.logits, 1)[0]
    assert len(trace.prefills) == 1
    return Run(meta, recorded, trace.prefills[0], watch, cached, ids, logits, model.model.rotary_emb)


def stages_free_of_ties(r: Run) -> int:
    """How many leading stages have a determined input: without noise, two clusters may be in either order."""
    n = len(r.record.stages)
    if noise_of(r.meta, r.recorded):
        return n
    return next((j + 1 for j in range(n) if r.recorded.get(f"p{j}_n_merged") == 2), n)


def noise_of(meta: dict, recorded: dict) -> list[Tensor]:
    """The recorded draws, one vector per clustering; empty where the run had no noise."""
    keys = sorted(key for key in recorded if key.endswith("_noise")) if meta["noise"] != "zero" else []
    return [torch.from_numpy(recorded[key]) for key in keys]


@pytest.fixture
def clustering(monkeypatch):
    """Puts the restatement's clustering, with recorded noise, in the place of ours."""

    def use(noise: list[Tensor]) -> None:
        def density_peaks(x, clusters, width, valid=None):
            centres, group = restatement.density_peaks(x[0].float(), width, noise.pop(0).float())
            return torch.tensor([centres]), group[None]

        if noise:
            monkeypatch.setattr("sparsevlm.methods.sparsevlm.density_peaks", density_peaks)

    return use


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("path", files("cases"), ids=stem)
def test_recorded_run(path, options, clustering):
    clustering(noise_of(*recording(path)))
    r = run(path, **options)
    text = r.meta["pre"] + r.meta["n_vis"]
    assert np.array_equal(r.record.raters[0].numpy() - text, r.recorded["raters"])
    stages = r.record.stages
    assert [s.layer for s in stages] == r.meta["pruning_loc"]
    if not r.meta["stable"]:
        return _close(stages[0].scores[0], r.recorded["p0_scores"], SCORES * np.abs(r.recorded["p0_scores"]).max())
    comparable = stages_free_of_ties(r)
    for j, stage in enumerate(stages):
        g = {key[len(f"p{j}_") :]: value for key, value in r.recorded.items() if key.startswith(f"p{j}_")}
        assert stage.tokens_in[0] == g["v_num_in"] and stage.tokens_out[0] == g["v_num_out"]
        assert stage.recycled[0] == g.get("n_merged", 0)
        after = stage.layer + 1
        for got, want in zip(r.watch.rope[after], r.rotary(torch.ones(1), _positions(g)), strict=True):
            torch.testing.assert_close(got, want[0], rtol=0, atol=1e-6)
        if j >= comparable:
            continue
        assert np.array_equal(stage.kept[0].numpy(), g["keep_local"])
        assert np.array_equal(stage.origin[0].numpy(), np.maximum(g["keep_origin"], -1))
        _close(stage.scores[0], g["scores"], SCORES * np.abs(g["scores"]).max())
        if "merged" in g:  # merged tokens follow all kept ones, in the order of their centres
            first = r.meta["pre"] + len(g["keep_local"])
            merged = r.watch.states[after][first : first + len(g["merged"])]
            swapped = g["n_merged"] == 2 and (merged[0] - torch.from_numpy(g["merged"][0])).abs().max() > LOGITS
            _close(merged.flip(0) if swapped else merged, g["merged"], LOGITS)
        if "hidden_out" in g and g["n_merged"] != 2:
            _close(r.watch.states[after], g["hidden_out"], LOGITS)
    assert [len(r.watch.states[i]) for i in range(len(r.cached))] == _lengths_in(r, options["early_drop"])
    assert r.cached == r.recorded["kv_len"].tolist()
    if comparable == len(stages):
        assert r.ids == r.recorded["gen_ids"].tolist()
        _close(r.logits, r.recorded["gen_logits"], LOGITS)
        last = torch.stack([r.watch.states[i][-1] for i in range(len(r.cached))])
        _close(last, r.recorded["layer_last_hidden_in"], LOGITS)


def _lengths_in(r: Run, early_drop: bool) -> list[int]:
    """Rows that each layer computes: the recorded ones, in a pruning layer less those that early dropping spares it."""
    lengths = r.recorded["layer_seq_in"].tolist()
    for j, stage in enumerate(r.record.stages if early_drop else []):
        pool = len(r.recorded.get(f"p{j}_recycled_local", ()))
        lengths[stage.layer] -= stage.tokens_in[0] - len(r.recorded[f"p{j}_keep_local"]) - pool
    return lengths


def _positions(g: dict) -> Tensor:
    return torch.from_numpy(g["positions_out"]).long().view(1, -1)


def _close(got: Tensor, want: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(got, torch.from_numpy(want).to(got.dtype), rtol=0, atol=float(tolerance))


def test_the_recordings_cover_all_variants():
    names = [path.stem for path in (SHIPPED / "cases").glob("*.npz")]
    assert {name.split("_")[0] for name in names} == {"v1", "v2", "v10", "video"}
