"""Dynamic-LLaVA against recorded runs of its authors' code (tests/goldens/seeds), in their checkpoints' layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparsevlm
from sparsevlm.core.policy import rate_loss, straight_through
from sparsevlm.methods._predictors import Predictors, Sizes
from sparsevlm.mini.training.policy import POLICY, Policy
from tests.goldens import load, predictor_recipe
from tests.goldens.load import files, recording, stem
from tests.goldens.recipe import CONFIGS, sha256_of

LOGITS = 5e-5
recordings = pytest.mark.recordings


def weights_of(meta: dict) -> dict[str, torch.Tensor]:
    """Both predictors by their names in a file."""
    made = {}
    for kind, prefix in (("image", "image_score_predictor."), ("output", "output_text_score_predictor.")):
        sizes = {"hidden": CONFIGS[meta["config"]]["hidden_size"]} | meta["predictor"]
        arrays = getattr(predictor_recipe, f"{kind}_predictor")(meta["seed"], **sizes)
        recorded = meta.get({"image": "predictor_sha256", "output": "text_predictor_sha256"}[kind])
        assert recorded in (None, sha256_of(arrays))
        made |= {prefix + name: torch.from_numpy(array) for name, array in arrays.items()}
    return made


def checkpoint_of(folder: Path, meta: dict, **config) -> Path:
    """A folder in the layout of the authors' checkpoints: the predictors in a shard among the language model's."""
    folder.mkdir(exist_ok=True)
    model = load.llama(meta["config"], meta["seed"])
    llm = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(llm, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    predictors = {f"model.{name}": value for name, value in weights_of(meta).items()}
    save_file(predictors, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    sparse = {"sparse_layer": meta["sparse_layer"], "vision_keep_rate": meta["keep_rate"]}
    sparse |= {"nhead": meta["predictor"]["nhead"]} | config
    (folder / "config.json").write_text(json.dumps({"model_type": "dynamic_llava_llama", "sparse_config": sparse}))
    return folder


def embeds_of(meta: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return load.prompt(meta["config"], meta["seed"], meta["pre"], meta["n_vis"], meta.get("n_text", 40))


@recordings
@pytest.mark.parametrize("path", [p for p in files("seeds", "dynllava_[!t]*.npz") if "nocache" not in p.stem], ids=stem)
@torch.no_grad()
def test_selection_gate_and_answers_are_the_recorded_ones(path: Path, tmp_path):
    meta, want = recording(path)
    model, (embeds, visual) = load.llama(meta["config"], meta["seed"]), embeds_of(meta)
    method = sparsevlm.build("dynamic_llava", predictor=str(checkpoint_of(tmp_path / "checkpoint", meta)), gate=True)
    steps, positions = len(want["gen_ids"]), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with method(model, visual_mask=visual) as trace:
            out = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=steps,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
    finally:
        hook.remove()
    assert out.sequences[0].tolist() == want["gen_ids"].tolist()
    np.testing.assert_allclose(torch.cat(out.logits).numpy(), want["gen_logits"], rtol=0, atol=LOGITS)
    assert torch.cat(positions[1:], 1)[0].tolist() == want["decode_positions"].tolist()
    cache, layer = out.past_key_values, meta["sparse_layer"]
    gate = cache.sparsevlm.at(layer).gate[0]
    assert gate[-(steps - 1) :].tolist() == want["text_decisions"].tolist()
    written = [len(gate) if i < layer else int(gate.sum()) for i in range(len(want["kv_len"]))]
    written[:layer] = [int(cache.layers[i].get_seq_length()) for i in range(layer)]
    assert written == want["kv_len"].tolist()
    stages = trace.prefills[0].stages
    keep = want["keep_visual"].tolist()
    if len(keep) == meta["n_vis"]:
        assert stages[0].tokens_out == [meta["n_vis"]]
        return
    (stage,) = stages
    assert stage.layer == layer - 1 and stage.kept[0].tolist() == keep
    scores = torch.from_numpy(want["score_logits"]).log_softmax(-1)[:, 0]
    torch.testing.assert_close(stage.scores[0], scores, rtol=0, atol=1e-5 * float(scores.abs().max()))


class Forced:
    """Makes generate() say given tokens."""

    def __init__(self, ids, start: int):
        self.ids, self.start = ids, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = int(self.ids[input_ids.shape[1] - self.start])
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([said]), 0.0)


@recordings
@pytest.mark.parametrize("path", files("seeds", "dynllava_*_nocache.npz"), ids=stem)
@torch.no_grad()
def test_uncached_answers_are_the_recorded_ones_but_for_the_token_that_stands_twice(path: Path, tmp_path):
    meta, want = recording(path)
    model, (embeds, visual) = load.llama(meta["config"], meta["seed"]), embeds_of(meta)
    method = sparsevlm.build("dynamic_llava", predictor=str(checkpoint_of(tmp_path / "checkpoint", meta)), gate=True)
    ids, layer, length = want["gen_ids"], meta["sparse_layer"], embeds.shape[1]
    with method(model, visual_mask=visual) as trace:
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=len(ids),
            min_new_tokens=len(ids),
            do_sample=False,
            use_cache=False,
            logits_processor=[Forced(ids, 0)],
            return_dict_in_generate=True,
            output_logits=True,
        )
    for record in trace.prefills:
        assert record.stages[0].kept[0].tolist() == want["keep_visual"].tolist()
    got = torch.cat(out.logits).numpy()
    np.testing.assert_allclose(got[1:], want["gen_logits"][1:], rtol=0, atol=LOGITS)
    # in their first step the last prompt token stands twice behind the pruning
    states = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[layer]
    first, after = meta["pre"], meta["pre"] + meta["n_vis"]
    kept = [*range(first), *(want["keep_visual"] + first).tolist(), *range(after, length)]
    once, twice = (dropped(model, states, rows, layer)[-1].numpy() for rows in (kept, [*kept, length - 1]))
    np.testing.assert_allclose(got[0], once, rtol=0, atol=LOGITS)
    np.testing.assert_allclose(want["gen_logits"][0], twice, rtol=0, atol=LOGITS)
    assert twice.argmax() == ids[0] and abs(once - twice).max() > 100 * LOGITS


def dropped(model, states: torch.Tensor, rows: list[int], layer: int) -> torch.Tensor:
    """Logits [rows, vocabulary] when only `rows` of the states that enter `layer` are computed on."""
    states, places = states[:, rows], torch.tensor([rows])
    rope = model.model.rotary_emb(states, position_ids=places)
    n = len(rows)
    mask = torch.full((1, 1, n, n), torch.finfo(states.dtype).min, dtype=states.dtype).triu(1)
    for module in model.model.layers[layer:]:
        states = module(states, attention_mask=mask, position_embeddings=rope, position_ids=places)
    return model.lm_head(model.model.norm(states))[0]


def trained_forward(model, embeds: torch.Tensor, layer: int, decide, eps: float | None = None) -> torch.Tensor:
    """Logits [L, vocabulary] of the forward of the training, with the policy [1, L] that `decide` makes of states."""
    policy = Policy() if eps is None else Policy(eps=eps)

    def enter(module, args):
        policy.rows[layer] = decide(args[0])

    before, hook = model.config._attn_implementation, model.model.layers[layer].register_forward_pre_hook(enter)
    model.set_attn_implementation(POLICY)
    try:
        return model(inputs_embeds=embeds, use_cache=False, shared=embeds.shape[1], policy=policy).logits[0]
    finally:
        hook.remove()
        model.set_attn_implementation(before)


@recordings
@pytest.mark.parametrize("path", files("seeds", "dynllava_train_*.npz"), ids=stem)
def test_training_is_the_recorded_one(path: Path):
    meta, want = recording(path)
    want = {name: torch.from_numpy(array) for name, array in want.items()}
    model = load.llama(meta["config"], meta["seed"])
    prompt, _ = load.prompt(meta["config"], meta["seed"], meta["pre"], meta["n_vis"], meta["n_instruct"])
    embeds = torch.cat([prompt, model.model.embed_tokens(want["labels"])[None].detach()], 1)
    predictors = predictors_of(weights_of(meta), meta)
    first, n, answer = meta["pre"], meta["n_vis"], meta["n_answer"]
    image, text, made = slice(first, first + n), slice(-answer, None), {}

    def decide(states):
        for name, predictor, rows in (
            ("score", predictors.image_score_predictor, image),
            ("text", predictors.output_text_score_predictor, text),
        ):
            made[name] = predictor(states[:, rows].detach())
        noise = want["gumbel_image"], want["gumbel_text"]
        kept, written = (
            straight_through(made[name].log_softmax(-1), g[None], meta["tau"])
            for name, g in zip(("score", "text"), noise, strict=True)
        )
        if answer < meta["output_text_len_for_training"]:
            written = torch.ones_like(written)
        ones = states.new_ones(1, states.shape[1])
        made["kept"], made["written"] = kept, written
        made["policy"] = torch.cat([ones[:, :first], kept, ones[:, first + n : -answer], written], 1)
        return made["policy"]

    out = trained_forward(model, embeds, meta["sparse_layer"], decide)
    assert torch.equal(made["policy"][0].round(), want["policy"])
    torch.testing.assert_close(made["policy"][0], want["policy"], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[-(answer + 1) :], want["logits"], rtol=0, atol=1e-5)
    ce = torch.nn.functional.cross_entropy(out[-(answer + 1) : -1], want["labels"])
    loss = ce + meta["mask_loss_weight"] * rate_loss(made["kept"], meta["keep_rate"])
    if answer >= meta["output_text_len_for_training"]:
        loss = loss + meta["mask_loss_weight"] * rate_loss(made["written"], meta["output_text_keep_rate"])
    assert ce.item() == pytest.approx(want["ce"].item(), rel=1e-6)
    assert loss.item() == pytest.approx(want["loss"].item(), rel=1e-6)
    for name, recorded in (("score", "grad_score_logits"), ("text", "grad_text_logits")):
        (gradient,) = torch.autograd.grad(loss, [made[name]], retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(made[name]) if gradient is None else gradient
        limit = 1e-5 * want[recorded].abs().max().item()
        torch.testing.assert_close(gradient[0], want[recorded], rtol=0, atol=limit)


def predictors_of(weights: dict[str, torch.Tensor], meta: dict) -> Predictors:
    sizes, hidden = meta["predictor"], CONFIGS[meta["config"]]["hidden_size"]
    width = sizes["d_model"]
    made = Predictors(Sizes(hidden, width, sizes["nhead"], sizes["dim_feedforward"], sizes["num_layers"], width))
    made.load_state_dict(weights)
    return made


@torch.no_grad()
def test_a_hard_policy_is_dropping():
    """The forward of the training, with decisions that are zeros and ones and no eps, computes what is dropped to."""
    model, layer = load.llama("A", 0), 2
    embeds, visual = load.prompt("A", 0, 5, 36, 9)
    states = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[layer]
    generator = torch.Generator().manual_seed(0)
    policy = torch.where(visual, (torch.rand(visual.shape, generator=generator) < 0.4).float(), 1.0)
    rows = policy[0].nonzero()[:, 0].tolist()
    assert 50 - 36 < len(rows) < 50
    got = trained_forward(model, embeds, layer, lambda states: policy, eps=0.0)[rows]
    torch.testing.assert_close(got, dropped(model, states, rows, layer), rtol=0, atol=1e-5)
    assert not torch.allclose(got, trained_forward(model, embeds, layer, lambda states: policy.fill_(1.0))[rows])


@recordings
def test_a_checkpoint_in_the_authors_layout_belongs_to_its_language_model(tmp_path):
    (path, *_) = files("seeds", "dynllava_A_*.npz")
    meta, _ = recording(path)
    folder = str(checkpoint_of(tmp_path, meta, vision_keep_rate=0.3, sparse_layer=3))
    model, (embeds, visual) = load.llama("A", meta["seed"]), embeds_of(meta)
    with sparsevlm.build("dynamic_llava", predictor=folder)(model, visual_mask=visual) as trace:
        model(inputs_embeds=embeds)
    assert [(s.layer, s.tokens_out) for s in trace.prefills[0].stages] == [(2, [172])]
    with pytest.warns(UserWarning, match="trained together with its language model, whose weights differ"):
        with sparsevlm.build("dynamic_llava", predictor=folder)(load.llama("A", meta["seed"] + 7), visual_mask=visual):
            pass
