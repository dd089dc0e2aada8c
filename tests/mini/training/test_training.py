"""Training of the embedded model: what is computed, that it learns, and that a killed run continues exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from sparsevlm.mini import weights_dir
from sparsevlm.mini.model import build_config, build_model, embed_patches
from sparsevlm.mini.training import __main__ as train
from sparsevlm.mini.training.batches import BatchShape, SceneBatches
from sparsevlm.mini.training.finetune import Answering
from sparsevlm.mini.training.hub import export
from sparsevlm.mini.training.packed import packed_attention, packed_positions
from sparsevlm.mini.training.plan import CONTINUATION, PLAN, SHORT, VIDEO, Phase, Settings
from sparsevlm.mini.training.pretrain import Alignment, NeutralBackground
from sparsevlm.mini.training.run import TrainingRun

CPU = torch.device("cpu")
TINY = (
    Phase("align", BatchShape(8, 2), 0.3, 0.4),
    Phase("neutral", BatchShape(8, 2), 0.2, 0.2),
    Phase("answer", BatchShape(8, 2, 2), 0.5, 0.4),
)


@pytest.fixture(autouse=True)
def muon_in_float32(monkeypatch):
    """torch's Muon orthogonalises in bfloat16, which takes a CPU without instructions for it seconds per step."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


@pytest.fixture(autouse=True)
def short_evaluations(monkeypatch):
    monkeypatch.setattr("sparsevlm.mini.training.run._TEST_IMAGES", 2)


@pytest.fixture(scope="module")
def shipped():
    return LlavaForConditionalGeneration.from_pretrained(weights_dir(), dtype=torch.float32).eval()


def test_config_is_that_of_the_shipped_weights():
    shipped = json.loads((weights_dir() / "config.json").read_text())
    built = json.loads(build_config().to_json_string(use_diff=False))

    def same(part, whole):
        for key, value in part.items():
            if isinstance(value, dict):
                same(value, whole[key])
            elif key not in ("architectures", "dtype"):
                assert whole[key] == value, key

    same(shipped, built)


def test_starting_weights_depend_on_the_seed_alone():
    first, again, other = (build_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_embed_patches_is_the_models_own_vision_path(shipped):
    pixels = torch.randn(2, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = shipped.model.multi_modal_projector(embed_patches(shipped, pixels, torch.arange(576).expand(2, -1)))
        theirs = shipped.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(ours, torch.stack(list(theirs)).view_as(ours))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_questions_are_answered_as_if_alone(shipped, attention):
    """A block behind a shared picture gives the logits of the ordinary forward of that prompt."""
    batch = SceneBatches("test", 0, 0, BatchShape(24, 1, 3))[0]
    blocks = batch["ids"].view(3, 12)
    with torch.no_grad():
        learner = Answering(shipped, torch.float32)
        together = learner._logits(batch, learner._visual(batch)).view(3, 12, -1)
        shipped.set_attn_implementation(attention)
        for block, logits in zip(blocks, together, strict=True):
            prompt = torch.cat([torch.tensor([1, 4, 6] + [3] * 576), block[block > 0]])[None]
            alone = shipped(input_ids=prompt, pixel_values=batch["pixels"]).logits[0, 579:]
            torch.testing.assert_close(logits[block > 0], alone, rtol=1e-4, atol=1e-4)


def test_a_windows_tokens_keep_their_places_in_the_whole_picture(shipped):
    """The language model sees a window as it would see the whole picture with all other tokens left out."""
    batch = SceneBatches("test", 0, 0, BatchShape(12, 1, 2))[0]
    with torch.no_grad():
        learner = Answering(shipped, torch.float32)
        visual = learner._visual(batch)
        together = learner._logits(batch, visual).view(2, 12, -1)
        whole, seen = torch.zeros(1, 576, 192), torch.ones(1, 579 + 12, dtype=torch.long)
        whole[0, batch["positions"][0]] = visual[0]
        seen[0, 3:579] = 0
        seen[0, 3 + batch["positions"][0]] = 1
        shipped.set_attn_implementation("eager")
        words = shipped.get_input_embeddings()
        for block, logits in zip(batch["ids"].view(2, 12), together, strict=True):
            inputs = torch.cat([words(torch.tensor([[1, 4, 6]])), whole, words(block[None])], 1)
            at = torch.arange(579 + 12)[None]
            alone = shipped(inputs_embeds=inputs, attention_mask=seen, position_ids=at).logits[0, 579:]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_packed_attention_is_attention_with_the_mask_it_stands_for():
    generator = torch.Generator().manual_seed(0)
    shared, blocks = 450, 3
    query, key, value = torch.randn(3, 2, 2, shared + 12 * blocks, 8, generator=generator)
    block = torch.cat([torch.full((shared,), -1), torch.arange(blocks).repeat_interleave(12)])
    order = torch.arange(len(block))
    visible = ((block[None] == -1) | (block[None] == block[:, None])) & (order[None] <= order[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=0.3)
    found, weights = packed_attention(None, query, key, value, None, 0.3, shared=shared)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert weights is None


def test_packed_positions_by_hand():
    positions = packed_positions(torch.tensor([[0, 1, 7], [0, 1, 9]]), 20, 2)
    assert positions.tolist() == [[0, 1, last, *range(20, 32), *range(20, 32)] for last in (7, 9)]


@pytest.mark.parametrize(
    ("objective", "shape", "steps", "share"),
    [
        (Alignment, BatchShape(8, 4), 12, 0.9),
        (NeutralBackground, BatchShape(8, 4), 12, 0.9),
        (Answering, BatchShape(8, 2, 4), 4, 0.7),
    ],
)
def test_loss_falls_on_a_batch_that_is_repeated(objective, shape, steps, share):
    model = build_model(0)
    learner = objective(model, torch.float32)
    learner.start()
    batch = SceneBatches("train", 0, 0, shape)[0]
    losses = []
    for _ in range(steps):
        loss = learner.loss(batch)
        for optimizer in learner.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        for optimizer in learner.optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < share * losses[0]


def test_stage_two_trains_everything_and_the_tower_slowly():
    model = build_model(0)
    learner = Answering(model, torch.float32)
    learner.start()
    learner.loss(SceneBatches("train", 0, 0, BatchShape(8, 1, 2))[0]).backward()
    for name, parameter in model.named_parameters():
        # the class token's last output and what comes after it are not used
        assert parameter.grad is not None or "post_layernorm" in name, name
    by_muon = {id(p) for group in learner.optimizers[0].param_groups for p in group["params"]}
    parts = (model.model.language_model.layers, model.model.multi_modal_projector)
    assert by_muon == {id(p) for part in parts for p in part.parameters() if p.ndim == 2}
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    helpers = {id(p) for p in learner.helpers.parameters()}
    assert rates.keys() - helpers == {id(p) for p in model.parameters()}
    tower = {rates[id(p)] for p in model.model.vision_tower.parameters()}
    assert max(tower) < min(rate for key, rate in rates.items() if rate not in tower)


@pytest.mark.slow
def test_scores_of_the_shipped_model_are_high_and_of_a_fresh_one_low(shipped):
    """Teacher-forced exact match, 12 pictures of unseen digits (.84 by generation when it was trained)."""
    shipped.set_attn_implementation("eager")
    data = SceneBatches("test", 0, 0, BatchShape(24, 4, 8))
    good = Answering(shipped).scores(data[i] for i in range(3))
    bad = Answering(build_model(0)).scores(data[i] for i in range(1))
    assert good["mean"] > 0.7 and good["color_of_shape"] > 0.9
    assert bad["mean"] < 0.2


@pytest.mark.parametrize("plan", [PLAN, SHORT, CONTINUATION, VIDEO])
def test_plan_uses_the_whole_run(plan):
    assert sum(phase.time_share for phase in plan) == pytest.approx(1)
    assert sum(phase.step_share for phase in plan) == pytest.approx(1)


@pytest.mark.slow
def test_a_run_goes_on_from_a_model(tmp_path, shipped):
    """Its head is kept, and with no step taken its weights are the initial ones."""
    plan = (Phase("answer", BatchShape(8, 2, 2), 1.0, 1.0),)
    run = TrainingRun(tmp_path / "run", Settings(steps=1), CPU, plan=plan, initial=weights_dir())
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in shipped.state_dict().items())
    heads = []
    step = run._step
    run._step = lambda *args: heads.append(run.model.lm_head.weight.clone()) or step(*args)
    run.train()
    assert torch.equal(heads[0], before["lm_head.weight"])
    assert not torch.equal(run.model.lm_head.weight, before["lm_head.weight"])
    with pytest.raises(ValueError, match="holds no model"):
        TrainingRun(tmp_path / "other", Settings(steps=1), CPU, initial=tmp_path)


def test_centers_lie_inside_their_objects():
    scene_batch = SceneBatches("train", 0, 0, BatchShape(24, 6))[0]
    centers = scene_batch["centers"].bool()
    assert 10 * 6 <= centers.sum() <= 23 * 6
    assert (scene_batch["classes"][centers] < 16).all()


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path, monkeypatch):
    settings = Settings(seed=3, steps=5, precision="float32")
    straight = TrainingRun(tmp_path / "straight", settings, CPU, plan=TINY)
    straight.train()
    assert straight.finished and straight.progress == pytest.approx(1)

    broken = TrainingRun(tmp_path / "broken", settings, CPU, plan=TINY, save_every=0)
    step = TrainingRun._step
    for survives in (1, 1, 2):  # dies within the first phase, at its end, within the last
        calls = iter(range(survives))

        def dying(self, *args, calls=calls):
            if next(calls, None) is None:
                raise Killed
            return step(self, *args)

        monkeypatch.setattr(TrainingRun, "_step", dying)
        with pytest.raises(Killed):
            broken.train()
        monkeypatch.setattr(TrainingRun, "_step", step)
        broken = TrainingRun(tmp_path / "broken", settings, CPU, plan=TINY, save_every=0)
    assert 0 < broken.state.total_steps < 5
    broken.train()
    assert broken.state.total_steps == straight.state.total_steps == 5
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in broken.model.state_dict().items())
    curves = [[{k: v for k, v in p.items() if k != "minutes"} for p in run.state.curve] for run in (straight, broken)]
    assert [point["phase"] for point in curves[0]] == ["align 8x8", "neutral 8x8", "answer 8x8"]
    assert [set(point) for point in curves[0]] == [set(point) for point in curves[1]]
    assert json.loads((tmp_path / "broken" / "learning_curve.json").read_text()) == broken.state.curve


@pytest.mark.slow
def test_a_run_in_minutes_ends_in_time_and_a_finished_one_does_nothing(tmp_path):
    settings = Settings(minutes=0.03)
    run = TrainingRun(tmp_path, settings, CPU, plan=TINY)
    run.train()
    assert run.finished and run.state.total_steps >= 3 and run.state.total_seconds >= 0.9 * 1.8
    again = TrainingRun(tmp_path, settings, CPU, plan=TINY)
    before = {key: value.clone() for key, value in again.model.state_dict().items()}
    again.train()
    assert again.state == run.state
    assert all(torch.equal(value, before[key]) for key, value in again.model.state_dict().items())


def test_other_settings_are_refused(tmp_path):
    TrainingRun(tmp_path, Settings(steps=1), CPU, plan=TINY)._save()
    with pytest.raises(ValueError, match="continue with these settings"):
        TrainingRun(tmp_path, Settings(steps=2), CPU, plan=TINY)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"minutes": 1, "steps": 1},
        {"minutes": 0},
        {"steps": -1},
        {"steps": 1, "seed": -1},
        {"steps": 1, "precision": "int8"},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError):
        Settings(**bad)


def test_command_line_trains_exports_and_refuses_to_overwrite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsevlm.mini.training.run.PLAN", TINY)
    out = tmp_path / "run"
    command = ["--out", str(out), "--steps", "3", "--device", "cpu", "--no-compile"]
    assert train.main(command) == 0
    model = LlavaForConditionalGeneration.from_pretrained(out / "model")
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained[key].to(torch.bfloat16)), key
    capsys.readouterr()
    assert train.main(command) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert train.main([*command, "--resume"]) == 0
    assert train.main(["--out", str(tmp_path / "x"), "--steps", "3", "--device", "abacus"]) == 2
    assert "unknown device 'abacus'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_export_writes_the_shipped_folder_and_spares_foreign_ones(tmp_path, shipped):
    shipped.set_attn_implementation("sdpa")
    folder = export(shipped, tmp_path / "model")
    export(shipped, folder)  # again: replaced
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == {
        p.name: 0o644 for p in weights_dir().iterdir()
    }
    for path in weights_dir().glob("[!cg]*.json"):
        assert json.loads((folder / path.name).read_text()) == json.loads(path.read_text()), path.name
    expected = load_file(weights_dir() / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[key], value) for key, value in expected.items()) and len(written) == len(expected)
    assert shipped.dtype == torch.float32
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(FileExistsError, match="holds something else"):
        export(shipped, foreign)
    assert (foreign / "cat.jpg").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "photos"]
