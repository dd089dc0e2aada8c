"""SCOPE, HoloV, MMTok, AnchorPrune and VScan against recordings of their authors' code (tests/goldens/frontier).

The recordings are float32, our runs float64. A choice that a disturbance of 1e-5 changes (`stable` = 0) is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import sparsevlm
from sparsevlm.methods import _clip, holov, mmtok, vscan
from tests.goldens import clip_recipe, frontier, frontier_recipe
from tests.goldens.load import files, recording, stem

pytestmark = pytest.mark.recordings
LOGITS, ROWS = 1e-5, 5e-6


def compare(path: Path, method) -> frontier.Run:
    """Generate from a recording's prompt and compare what was recorded of it."""
    meta, want = recording(path)
    r = frontier.run(meta["config"], meta["seed"], method)
    if not meta["stable"]:
        assert len(r.record.stages[0].kept[0]) == len(want["kept"])
        return r
    assert r.record.stages[0].kept[0].tolist() == want["kept"].tolist()
    assert r.ids == want["gen_ids"].tolist()
    np.testing.assert_allclose(r.logits.numpy(), want["gen_logits"], rtol=0, atol=LOGITS)
    if "projected" in want:
        np.testing.assert_allclose(r.projected.numpy(), want["projected"], rtol=0, atol=ROWS)
    return r


def cases(path: Path, prefix: str = "kept_") -> list[tuple[str, int, np.ndarray]]:
    """What was recorded of made-up signals: name, number of tokens, and choice, where it is stable."""
    want = recording(path)[1]
    names = [key.removeprefix(prefix) for key in want if key.startswith(prefix)]
    assert names
    found = [(name, int(name.split("_")[-1]), want[prefix + name]) for name in names]
    return [(name, n, kept) for name, n, kept in found if want.get(f"stable_{name}", 1)]


@pytest.mark.parametrize("path", files("frontier", "scope_*.npz"), ids=stem)
def test_scope(path: Path):
    meta, want = recording(path)
    options = {"alpha": meta["alpha"], "combine": {"multi": "multiply", "add": "add"}[meta["combined"]]}
    if meta["level"] == "model":
        compare(path, sparsevlm.build("scope", budget=meta["budget"], **options))
        return
    method = sparsevlm.build("scope", **options)
    for _, count, order in cases(path, "order_"):
        assert method.reduce(frontier.Signals(meta["seed"]), count).origin[0].tolist() == sorted(order.tolist())


@pytest.mark.parametrize("path", files("frontier", "holov_*.npz"), ids=stem)
def test_holov(path: Path):
    """The authors' quotas, and those that RESTORE's authors cut and redistribute, which the method uses."""
    meta, want = recording(path)
    signals = frontier.Signals(meta["seed"], projected=True)
    attention = signals.cls_attention().mean(1)
    for _, count, order in cases(path, "order_"):
        own = holov.choose(attention, count, meta["num_patches"], redistribute=False)
        assert own[0].tolist() == order.tolist()
    for name, count, order in [c for c in cases(path, "redistributed_") if not c[0].startswith("stable")]:
        if want[f"redistributed_stable_{name}"]:
            assert sparsevlm.build("holov").reduce(signals, count).origin[0].tolist() == order.tolist()


@pytest.mark.parametrize("path", files("frontier", "mmtok_*.npz"), ids=stem)
def test_mmtok(path: Path):
    meta, _ = recording(path)
    options = {"alpha": meta["alpha"], "text_temperature": meta["tv_temp"], "vision_temperature": meta["vv_temp"]}
    if meta["level"] == "model":
        compare(path, sparsevlm.build("mmtok", budget=meta["budget"], words="all", **options))
        return
    for name, count, kept in cases(path):
        signals = frontier.Signals(meta["seed"], projected=True)
        if name.startswith("opt"):
            other = meta[name]
            options = dict(alpha=other["alpha"], text_temperature=other["tv"], vision_temperature=other["vv"])
        if name.startswith("pad"):
            size = tuple(map(int, meta[name].split("x")))
            signals.more["free"] = torch.tensor([mmtok.outside_padding(size, frontier_recipe.SIDE)])
        method = sparsevlm.build("mmtok", words="all", **options)
        signals.more["words"] = method.text_rows(signals.signals["words"][None], signals.features)
        assert method.reduce(signals, count).origin[0].tolist() == kept.tolist(), name


@pytest.mark.parametrize("path", files("frontier", "mmtok_text*.json"), ids=stem)
def test_mmtok_words_and_padding(path: Path):
    recorded = json.loads(path.read_text())
    for row in recorded["keywords"]:
        assert mmtok.keywords(row["question"]) == row["keywords"].split()
    for size, patches in recorded["padding"].items():
        free = mmtok.outside_padding(tuple(map(int, size.split("x"))), frontier_recipe.SIDE)
        assert [i for i, outside in enumerate(free) if not outside] == sorted(patches)


@pytest.fixture
def clip(monkeypatch) -> dict[int, CLIPModel]:
    """By seed: CLIP around the recorded tower; its text tower is replaced by the recorded embeddings."""

    class ByDemand(dict):
        def __missing__(self, seed: int) -> CLIPModel:
            weight, texts = frontier_recipe.clip_head(seed)
            vision = CLIPVisionConfig(**clip_recipe.CLIP_CONFIG)
            text = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
            config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=len(weight))
            model = CLIPModel(config).requires_grad_(False)
            tower = {name: torch.from_numpy(x) for name, x in clip_recipe.clip_state_dict(seed).items()}
            model.vision_model.load_state_dict(tower)
            model.visual_projection.weight.data = torch.from_numpy(weight)
            monkeypatch.setattr(_clip._Loaded, "embed", lambda self, question: frontier.tensor(texts))
            return self.setdefault(seed, model.double())

    return ByDemand()


@pytest.mark.parametrize("path", files("frontier", "anchorprune_*.npz"), ids=stem)
def test_anchorprune(path: Path, clip):
    meta, want = recording(path)
    options = {"tau": meta["tau"], "patience": meta["patience"], "k_max": meta["kmax_ratio"]}
    if meta["level"] == "model":
        asked = {"clip": clip[meta["seed"]], "tokenizer": "none", "question": lambda ids: ""}
        r = compare(path, sparsevlm.build("anchorprune", budget=meta["budget"], **asked, **options))
        if "relevance" in want:
            np.testing.assert_allclose(r.record.stages[0].scores[0].numpy(), want["relevance"], rtol=0, atol=5e-6)
        if meta["stable"]:
            assert {*want["anchor"].tolist()} <= {*r.record.stages[0].kept[0].tolist()}
        return
    signals = frontier.Signals(meta["seed"], segments=meta["segments"])
    patch, text = signals.signals["clip_patch"], signals.signals["clip_text"]
    relevance = -(patch @ text.T).mean(1)
    signals.relevance = ((relevance - relevance.min()) / (relevance.max() - relevance.min()))[None]
    np.testing.assert_allclose(signals.relevance[0].numpy(), want["relevance"], rtol=0, atol=5e-6)
    signals.more["embeds"] = patch[None]
    method = sparsevlm.build("anchorprune", **options)
    for name, count, kept in cases(path):
        assert method.reduce(signals, count).origin[0].tolist() == kept.tolist()
        anchor = want[f"anchor_{name}"].tolist()
        by_relevance = signals.relevance[0].argsort(descending=True)[: count // 2]
        ranked = signals.more["embeds"][:, by_relevance]
        assert int(method.anchor_size(ranked, meta["k_min"][name])) == len(anchor)
        assert by_relevance[: len(anchor)].tolist() == anchor


@pytest.mark.parametrize("path", files("frontier", "vscan_*.npz"), ids=stem)
def test_vscan(path: Path):
    meta, want = recording(path)
    if meta["level"] == "model":
        keep = (meta["visual_token_num"], *meta["image_token_list"])
        r = compare(path, sparsevlm.build("vscan", keep=keep, layer=meta["layer_list"][0]))
        if meta["stable"]:
            assert r.record.stages[1].kept[0].tolist() == want["kept2"].tolist()
        assert r.record.stages[1].layer == meta["layer_list"][0] - 1 and r.cached == want["kv_len"].tolist()
        return
    signals = frontier.Signals(meta["seed"], projected=True)
    attention = signals.signals["cls"].mean(1)[:, None]
    for name, count, kept in cases(path):
        chosen = vscan.choose(attention[5], attention[22], frontier_recipe.SIDE, count, remainder=False)
        assert chosen[0].tolist() == kept.tolist()
        rows = vscan.merge(signals.features, chosen)[0]
        np.testing.assert_allclose(rows.numpy(), want[f"merged_{name}"], rtol=0, atol=ROWS)


def test_what_follows_from_a_file_is_what_was_drawn():
    """The recipe of the signals is the recorded one."""
    from tests.goldens.recipe import sha256_of

    for path in files("frontier", "*_signals_s*.npz"):
        meta = recording(path)[0]
        drawn = frontier_recipe.signals(meta["seed"], meta.get("segments", 1))
        assert sha256_of(drawn) == meta["signals_sha256"], path
