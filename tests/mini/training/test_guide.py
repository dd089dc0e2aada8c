"""Training a guide: what it begins with, what it shares with `mini`, and that a stopped run goes on."""

import numpy as np
import pytest
import torch

import sparsevlm
from sparsevlm.mini import weights_dir
from sparsevlm.mini.training import guide
from sparsevlm.mini.training.batches import BatchShape
from sparsevlm.mini.training.guide import GuideRun, GuideSettings
from sparsevlm.mini.training.hub import load_weights
from sparsevlm.mini.training.plan import Phase
from sparsevlm.runtime.families import locate

CPU = torch.device("cpu")
TINY = (Phase("answer", BatchShape(8, 2, 2), 1.0, 1.0),)
SHARED = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens.")


@pytest.fixture(autouse=True)
def short_evaluations(monkeypatch):
    monkeypatch.setattr("sparsevlm.mini.training.run._TEST_IMAGES", 2)


def settings(steps: int = 2, **options) -> GuideSettings:
    return GuideSettings(seed=0, steps=steps, precision="float32", **options)


def state(run: GuideRun) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_begun_from_mini_only_layers_norm_and_head_are_trained(tmp_path):
    run, mini = GuideRun(tmp_path, settings(), CPU, plan=TINY, initial=weights_dir()), load_weights(weights_dir())
    before = state(run)
    assert len(run.model.model.language_model.layers) == 2
    assert all(torch.equal(value, mini[name]) for name, value in before.items())
    run.train()
    for name, value in state(run).items():
        shared = name.startswith(SHARED)
        assert torch.equal(value, before[name]) == shared, name


def test_from_nothing_nothing_is_minis_and_all_is_trained(tmp_path):
    run = GuideRun(tmp_path, settings(from_nothing=True, layers=1), CPU, plan=TINY)
    before, mini = state(run), load_weights(weights_dir())
    assert not torch.equal(before[SHARED[2] + "weight"], mini[SHARED[2] + "weight"])
    run.train()
    changed = {name.rsplit(".", 2)[0] for name, value in state(run).items() if not torch.equal(value, before[name])}
    assert any("vision_tower" in name for name in changed) and any("layers.0" in name for name in changed)
    assert not any("layers.1." in name for name in before if "language_model" in name)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole = GuideRun(tmp_path / "whole", settings(4), CPU, plan=TINY, initial=weights_dir())
    whole.train()
    part = GuideRun(tmp_path / "part", settings(4), CPU, plan=TINY, initial=weights_dir(), save_every=0.0)
    step, done = part._step, []

    def stop(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(True)
        return step(*args)

    part._step = stop
    with pytest.raises(KeyboardInterrupt):
        part.train()
    resumed = GuideRun(tmp_path / "part", settings(4), CPU, plan=TINY, initial=weights_dir())
    assert resumed.state.total_steps == 2
    resumed.train()
    assert all(torch.equal(value, state(resumed)[name]) for name, value in state(whole).items())
    with pytest.raises(ValueError, match="belongs to a run"):
        GuideRun(tmp_path / "part", settings(4, layers=3), CPU, plan=TINY, initial=weights_dir())


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guide, "CONTINUATION", TINY)
    command = ["--out", str(tmp_path), "--steps", "1", "--device", "cpu"]
    assert guide.main(command) == 0
    assert guide.main(command) == 2 and "--resume continues it" in capsys.readouterr().err
    assert guide.main([*command, "--layers", "0"]) == 2 and "1 to 12 layers" in capsys.readouterr().err
    model, _ = sparsevlm.load("mini")
    with sparsevlm.build("sgl", guide=tmp_path / "model", shared=True, budget=64)(model):
        pass


def test_shipped_guide_is_minis_default_and_shares_its_tower():
    model, processor = sparsevlm.load("mini")
    picture = np.random.RandomState(0).randint(0, 256, (168, 168, 3), dtype=np.uint8)
    inputs = processor(text="what digit is red ?", images=picture)
    kept = []
    for options in ({}, {"guide": "mini-guide", "shared": True}, {"shared": False}):
        with torch.no_grad(), sparsevlm.build("sgl", budget=64, **options)(model) as trace:
            model(**inputs)
        kept.append(trace.prefills[0].stages[0].scores[0])
    assert torch.equal(kept[0], kept[1])
    guides = [sparsevlm.build("sgl").attach(locate(model)).guide.family.model for _ in range(2)]
    assert guides[0] is guides[1]  # read once
    torch.testing.assert_close(kept[0], kept[2])
    weights = weights_dir("mini-guide") / "model.safetensors"
    assert weights.stat().st_size < 4e6
