"""ATP-LLaVA after a third party's reading: the port's arithmetic (tests/goldens/seeds), and what holds beyond it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsevlm
from sparsevlm.core.thresholds import (
    Thresholds,
    excess,
    layer_penalty,
    soft_mask,
    spatial_scores,
    stride_of,
    target_loss,
)
from sparsevlm.methods._grid import grid_sample
from sparsevlm.methods._modules import fingerprint, write_modules
from sparsevlm.methods._threshold_files import start
from sparsevlm.runtime.families import locate
from tests.goldens import recipe
from tests.goldens.load import files, recording, stem
from tests.tiny import GENERATE, PATCHES, inputs, llava, logits, same

TARGET = 144  # of the recordings


@pytest.mark.recordings
@pytest.mark.parametrize("path", files("seeds", "atp_port_*.npz"), ids=stem)
@torch.no_grad()
def test_the_ports_arithmetic(path: Path):
    meta, want = recording(path)
    want = {name: torch.from_numpy(array) for name, array in want.items()}
    random, heads, n, text = np.random.RandomState(15000 + meta["seed"]), meta["heads"], meta["n_vis"], meta["n_text"]
    logits_, offsets = recipe._draw(random, (heads, n, n), 1), recipe._draw(random, (n,), 0.3)
    paid = torch.from_numpy(logits_ + offsets[None, :, None] + np.float32(0.4)).mean((0, 2))
    attention = np.abs(recipe._draw(random, (heads, text, n), 1))
    got = torch.from_numpy(attention / attention.sum(-1, keepdims=True)).mean((0, 1))
    torch.testing.assert_close(paid, want["S_self"])
    torch.testing.assert_close(got, want["S_cross"])
    redundant = (paid + got)[None] / 2
    torch.testing.assert_close(redundant[0], want["S_redundant"])
    sampling = meta["sampling_rate"]
    spatial = spatial_scores(torch.from_numpy(grid_sample(n, stride_of(sampling))), sampling)
    assert torch.equal(spatial, want["S_spatial"])
    thresholds = Thresholds(meta["hidden"])
    thresholds.load_state_dict({name[2:]: weight for name, weight in want.items() if name.startswith("w_")})
    theta_r, theta_s = (x.sigmoid() for x in thresholds(paid.mean()[None], got.mean()[None]))
    torch.testing.assert_close(theta_r[0], want["theta_r"])
    torch.testing.assert_close(theta_s[0], want["theta_s"])
    above = excess(redundant, spatial[None], theta_r, theta_s)[0]
    soft = soft_mask(above, meta["temperature"])
    torch.testing.assert_close(soft, want["soft"])
    assert (above > 0).nonzero()[:, 0].tolist() == want["keep_visual"].tolist()
    kept = [soft.sum()[None] / part for part in (1, 2, 4)]
    penalty, loss = layer_penalty(kept, tuple(meta["layers"]), n), target_loss(kept, TARGET)
    assert penalty.item() == pytest.approx(want["atp_penalty"].item(), rel=1e-6)
    assert loss.item() == pytest.approx(want["target_loss"].item(), rel=1e-6)


def build(**options):
    return sparsevlm.build("atp_llava", **{"modules": "untrained", **options})


@torch.no_grad()
def test_scores_are_those_of_the_models_own_attention():
    """Stage 1, and stage 2 among the tokens that are left, from the eager model's attention, row by row."""
    model = llava("llama", "eager")
    x, _ = inputs("one", model)
    first, layer = 5, 1
    attention = model(**x, output_attentions=True).attentions[layer][0].mean(0)
    visual = slice(first, first + PATCHES)
    own, cross = attention[visual, visual].mean(0), attention[first + PATCHES :, visual].mean(0)
    for variant in ("normalised", "port"):
        with build(variant=variant)(model) as trace:
            model(**x)
        stage = trace.prefills[0].stages[0]
        assert stage.layer == layer
        if variant == "port":
            own = logits_of(model, x, layer)[visual, visual].mean(1)
        levels = (own.mean(), cross.mean()) if variant == "port" else (own.sum(), cross.sum())
        redundant = (own + cross) / 2 if variant == "port" else (own / own.mean() + cross / cross.mean()) / 2
        theta_r, theta_s = start((1, 5, 6), 0)[0](*(level[None] for level in levels))
        theta_r = theta_r.sigmoid() if variant == "port" else torch.nn.functional.softplus(theta_r)
        grid = torch.arange(PATCHES)
        sampled = (grid // 6 % 4 == 0) & (grid % 6 % 4 == 0)
        want = torch.maximum(redundant - theta_r[0], 0.8125 * sampled - theta_s[0].sigmoid())
        same(stage.scores[0], want, 1e-5)
        assert stage.kept[0].tolist() == (want > 0).nonzero()[:, 0].tolist()
        assert 0 < len(stage.kept[0]) < PATCHES


def logits_of(model, x: dict, layer: int) -> torch.Tensor:
    """Mean logits [L, L] of a layer before mask and softmax."""
    text, seen = model.model.language_model, {}
    hook = text.layers[layer].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs, hidden=args[0]), with_kwargs=True
    )
    model(**x)
    hook.remove()
    module, (cos, sin) = text.layers[layer], seen["position_embeddings"]
    normed = module.input_layernorm(seen["hidden"])
    rotate = locate(model).rotate
    query, key = (
        rotate(p(normed).unflatten(-1, (-1, 16)).transpose(1, 2), cos, sin)
        for p in (module.self_attn.q_proj, module.self_attn.k_proj)
    )
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query @ key.mT / 4)[0].mean(0)


def test_thresholds_that_nothing_misses_keep_the_model_as_it_is_and_ones_that_all_miss_keep_one_token():
    model = llava()
    x, _ = inputs("batch", model)
    want = logits(model.generate(**x, **GENERATE))
    with build(shift=-1e9)(model) as trace:
        assert torch.equal(logits(model.generate(**x, **GENERATE)), want)
    assert [s.tokens_out for s in trace.prefills[0].stages] == [[PATCHES] * 3] * 3
    with build(shift=1e9)(model) as trace:
        model(**x)
    assert [s.tokens_out for s in trace.prefills[0].stages] == [[1] * 3] * 3


def test_a_soft_mask_becomes_the_hard_one():
    above = torch.tensor([-0.5, -1e-3, 1e-3, 0.5])
    assert torch.equal(soft_mask(above, 1e6), (above > 0).float())
    assert soft_mask(above, 10.0)[0] == pytest.approx(1 / (1 + np.exp(5.0)))


def written_file(folder: Path, model, redundant: float, spatial: float, **facts) -> str:
    """Modules of three stages with constant threshold logits."""
    family, modules = locate(model), start((1, 3, 5), 0)
    with torch.no_grad():
        for module in modules:
            for weight in module.parameters():
                weight.zero_()
            module.redundant_threshold_head.bias.fill_(redundant)
            module.spatial_threshold_head.bias.fill_(spatial)
    known = {"method": "atp_llava", "hidden": 64, "n_layers": family.n_layers, "layers": "1,3,5", "rate": 0.2}
    known |= {"variant": "normalised", "fingerprint": fingerprint(family.outer)} | facts
    return str(write_modules(folder / "modules.safetensors", modules.state_dict(), known))


def test_a_sample_keeps_its_places_in_the_picture_at_later_stages(tmp_path):
    model = llava()
    x, _ = inputs("multi", model)  # two pictures
    path = written_file(tmp_path, model, redundant=1e9, spatial=-20)
    with build(modules=path)(model) as trace:
        model(**x)
    stages = trace.prefills[0].stages
    assert [s.layer for s in stages] == [1, 3, 5]
    want = [p + 36 * i for i in (0, 1) for p in (0, 4, 24, 28)]  # every fourth row and column of 6 x 6
    assert [s.origin[0].tolist() for s in stages] == [want] * 3
    with build(modules=path, spatial=False)(model) as trace:
        model(**x)
    assert trace.prefills[0].stages[0].tokens_out == [1]


@pytest.mark.parametrize(
    "size,want",
    [(16, [0]), (17, [0, 1]), (20, [0, 16]), (36, [0, 4, 24, 28])],
    ids=["grid", "first token", "line", "larger"],
)
def test_samples_of_grids_and_of_what_is_none(size: int, want: list[int]):
    assert grid_sample(size, 4).nonzero()[0].tolist() == want


def test_text_has_a_say():
    model = llava()
    x, _ = inputs("one", model)
    before, question = x["input_ids"].split([5 + PATCHES, 9], 1)
    other = {**x, "input_ids": torch.cat([before, 3 + (question + 31) % 80], 1)}

    def kept(x: dict, **options) -> list[int]:
        with build(spatial=False, **options)(model) as trace:
            model(**x)
        return trace.prefills[0].stages[0].kept[0].tolist()

    assert kept(x) != kept(other)
    assert kept(x, importance="cross") != kept(other, importance="cross")


def test_what_does_not_fit_is_refused(tmp_path):
    model = llava()

    def refused(message: str, error=ValueError, **options):
        with pytest.raises(error, match=message), sparsevlm.build("atp_llava", **options)(model):
            pass

    refused("has no budget .got 64", budget=64)
    refused("variant 'paper' is unknown; known: normalised, port", variant="paper")
    refused("sampling 0.0 is a share", sampling=0.0)
    refused("no file of modules", FileNotFoundError, modules="nowhere")
    path = written_file(tmp_path, model, 0, 0)
    refused(r"has modules for layers \(1, 3, 5\), not \(1, 2\)", modules=path, layers=(1, 2))
    refused("trained with variant='normalised', not 'port'", modules=path, variant="port")
    refused("number of layers 4, this one has 8", modules=written_file(tmp_path, model, 0, 0, n_layers=4))
    refused("does not hold ATP-LLaVA's modules", modules=written_file(tmp_path, model, 0, 0, layers="1,3"))
    refused("infinite or no numbers", modules=written_file(tmp_path, model, float("nan"), 0))
