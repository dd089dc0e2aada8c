"""Training of modules on the frozen model: what is computed, what changes, and that a killed run continues exactly."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import sparsevlm
from sparsevlm.methods._modules import read_modules
from sparsevlm.mini import weights_dir
from sparsevlm.mini.training import modules as command
from sparsevlm.mini.training.batches import BatchShape, SceneBatches
from sparsevlm.mini.training.modules import ModuleRun, ModuleSettings
from sparsevlm.mini.training.plan import Phase
from sparsevlm.mini.training.policy import Policy, policy_attention
from sparsevlm.mini.training.predictor import GRADIENT_LIMIT, KeepPredictor
from sparsevlm.mini.training.shift import prompts, solve
from sparsevlm.mini.training.thresholds import ThresholdTraining

CPU = torch.device("cpu")
TINY = {"dynamic_llava": BatchShape(8, 2, 2), "atp_llava": BatchShape(24, 1, 1)}


@pytest.fixture
def model():
    return LlavaForConditionalGeneration.from_pretrained(weights_dir(), dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def short_evaluations(monkeypatch):
    monkeypatch.setattr("sparsevlm.mini.training.run._TEST_IMAGES", 1)


class Layer:
    layer_idx = 3


def test_a_block_under_a_policy_is_computed_as_if_alone():
    torch.manual_seed(0)
    shared, query, key, value = 30, *torch.randn(3, 2, 4, 30 + 24, 8)
    policy = Policy({2: torch.rand(2, shared)})
    together, _ = policy_attention(Layer, query, key, value, None, 0.35, shared, policy)
    first, _ = policy_attention(Layer, query[:, :, :30], key[:, :, :30], value[:, :, :30], None, 0.35, shared, policy)
    torch.testing.assert_close(together[:, :shared], first)
    for start in (30, 42):
        rows = [*range(30), *range(start, start + 12)]
        own = Policy({0: torch.cat([policy.rows[2], torch.ones(2, 12)], 1)})
        alone, _ = policy_attention(Layer, query[:, :, rows], key[:, :, rows], value[:, :, rows], None, 0.35, 42, own)
        torch.testing.assert_close(together[:, start : start + 12], alone[:, 30:])
    whole, _ = policy_attention(Layer, query, key, value, None, 0.35, shared, Policy({4: policy.rows[2]}))
    assert not torch.allclose(whole, together)  # layer 4 is not there yet


@pytest.mark.parametrize("method", ["dynamic_llava", "atp_llava"])
def test_a_step_changes_the_modules_alone_and_no_decision_weighs_more_than_allowed(model, method):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    if method == "dynamic_llava":
        objective = KeepPredictor(model, 0.2, 1)
    else:
        objective = ThresholdTraining(model, 64.0, (2, 5, 9), 0.0625)
    batch = SceneBatches("train", 0, 0, TINY[method])[0]
    objective.rate(5, 0.3)
    started = [p.detach().clone() for p in objective.parameters]
    seen = []
    run = objective.run

    def watched(batch, decide, **options):
        def watch(decision):
            def decide(states, policy):
                made = decision(states, policy)
                made.register_hook(lambda gradient: seen.append(gradient.abs().max().item()))
                return made

            return decide

        return run(batch, {layer: watch(d) for layer, d in decide.items()}, **options)

    objective.run = watched
    objective.loss(batch).backward()
    objective.optimizers[0].step()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(started, objective.parameters, strict=True))
    assert len(seen) == (1 if method == "dynamic_llava" else 3) and max(seen) <= GRADIENT_LIMIT


def run_of(folder, method: str, steps: int = 3) -> ModuleRun:
    settings = ModuleSettings(0, None, steps, method=method, rate=0.2)
    plan = (Phase("answer", TINY[method], 1.0, 1.0),)
    return ModuleRun(folder, settings, CPU, plan=plan, initial=weights_dir(), save_every=0)


@pytest.mark.parametrize("method", ["dynamic_llava", "atp_llava"])
def test_a_killed_run_continues_exactly_and_its_file_fits_mini(tmp_path, monkeypatch, method):
    whole = run_of(tmp_path / "whole", method)
    whole.train()
    step = ModuleRun._step

    def killed(self, phase, batch):
        if self.state.step == 2:
            raise KeyboardInterrupt
        return step(self, phase, batch)

    monkeypatch.setattr(ModuleRun, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "part", method).train()
    monkeypatch.setattr(ModuleRun, "_step", step)
    part = run_of(tmp_path / "part", method)
    assert part.state.total_steps == 2
    part.train()
    one, other = load_file(whole.file), load_file(part.file)
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    assert whole.file.stat().st_size <= 100_000
    option = {"dynamic_llava": "predictor", "atp_llava": "modules"}[method]
    mini, _ = sparsevlm.load("mini")
    with sparsevlm.build(method, **{option: str(whole.file)})(mini):  # no warning, no error
        pass


def test_settings_and_folders_that_do_not_go_on_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="share of the tokens between 0 and 1, got 1.5"):
        ModuleSettings(0, None, 3, rate=1.5)
    run_of(tmp_path, "dynamic_llava", steps=1).train()
    with pytest.raises(ValueError, match="belongs to a run with"):
        run_of(tmp_path, "dynamic_llava", steps=2)
    assert command.main(["dynamic_llava", "--out", str(tmp_path), "--steps", "1"]) == 2
    assert "--resume continues it" in capsys.readouterr().err


@torch.no_grad()
def test_training_and_method_put_the_same_tokens_above_the_thresholds(model):
    """Of whole pictures, at all three stages: hard masks in the training against rows that are gone.

    In float64: what is masked decides the largest logit, below which float32 has no digits left.
    """
    (batch,) = prompts(1)
    whole = batch["attention_mask"].all(1)  # padding would shift positions, whose tables are float32
    batch = {name: value[whole][:2] for name, value in batch.items()}
    mini, _ = sparsevlm.load("mini", dtype=torch.float64)
    with sparsevlm.build("atp_llava", modules="untrained", seed=3)(mini) as trace:
        mini.model(**batch | {"pixel_values": batch["pixel_values"].double()})
    stages = trace.prefills[0].stages
    objective = ThresholdTraining(model.double(), 64.0, (2, 5, 9), 0.0625, seed=3)
    objective.helpers.double()
    objective.eps = 1e-200  # so little leaks nothing, and rows that see nothing stay defined
    drawn = SceneBatches("train", 0, 1, BatchShape(24, 8, 1))[0]
    drawn = {name: value[whole][:2] for name, value in drawn.items()}
    drawn["pixels"] = drawn["pixels"].double()
    above = objective.above
    scores, kept = [], []
    objective.above = lambda *args: scores.append(above(*args)) or scores[-1]
    objective._run(drawn, kept, None)
    assert [k.int().tolist() for k in kept] == [s.tokens_out for s in stages]
    for stage, found in zip(stages, scores, strict=True):
        for b, origin in enumerate(stage.origin):
            assert (found[b, origin] > 0).all()
    torch.testing.assert_close(torch.stack(stages[0].scores), scores[0], rtol=1e-5, atol=1e-5)


def test_the_shift_reaches_the_mean_that_is_asked_for():
    mini, _ = sparsevlm.load("mini")
    data = prompts(8)
    shift, reached = solve(mini, data, 140.0, modules="untrained")
    assert abs(reached - 140) < 6
    assert reached != solve(mini, data, 120.0, modules="untrained")[1]


@pytest.mark.parametrize("method", ["dynamic_llava", "atp_llava"])
def test_shipped_modules_say_what_they_are(method):
    file = read_modules(weights_dir().parent / "modules" / f"{method}.safetensors", method)
    assert file.path.stat().st_size <= 100_000
    assert file.number("rate") == pytest.approx(1 / 9) and file.integer("steps") > 0


@pytest.mark.parametrize("method,leaving", [("dynamic_llava", [64.0]), ("atp_llava", None)])
def test_methods_run_on_mini_without_options(method, leaving):
    mini, _ = sparsevlm.load("mini")
    (batch,) = prompts(1)
    build = sparsevlm.build(method)
    assert build.plan(576, 12).layers  # so that eval.run takes it without a budget
    with build(mini) as trace, torch.no_grad():
        mini.model(**{name: value[:1] for name, value in batch.items()}, use_cache=False)
    (record,) = trace.prefills
    assert leaving in (None, record.leaving) and 1 < record.leaving[0] < 300
