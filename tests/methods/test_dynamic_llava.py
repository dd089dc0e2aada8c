"""Dynamic-LLaVA: its gate, its files of weights and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsevlm
from sparsevlm.methods._modules import fingerprint, write_modules
from sparsevlm.methods._predictors import Predictors, Sizes
from sparsevlm.runtime.families import locate
from tests.tiny import GENERATE, PATCHES, inputs, llava, logits, same, single


def build(**options):
    return sparsevlm.build("dynamic_llava", **{"predictor": "untrained", "keep": 9, **options})


def chosen(model, x: dict, **options) -> list[int]:
    with build(**options)(model) as trace:
        model(**x)
    return trace.prefills[0].stages[0].kept[0].tolist()


def test_the_selection_does_not_depend_on_the_question():
    model = llava()
    x, _ = inputs("one", model)
    before, question = x["input_ids"].split([5 + PATCHES, 9], 1)
    other = {**x, "input_ids": torch.cat([before, 3 + question % 80], 1)}
    assert not torch.equal(x["input_ids"], other["input_ids"])
    assert chosen(model, x) == chosen(model, other)
    assert chosen(model, x) != chosen(model, x, seed=1)
    assert chosen(model, x) != chosen(model, {**x, "pixel_values": x["pixel_values"].flip(-1)})


@torch.no_grad()
def test_what_was_not_written_stays_unseen_in_a_second_turn():
    """Against layers called by hand with a mask: a gated token is seen by itself alone, from layer k on."""
    model = llava()
    x, _ = inputs("one", model)
    method, n = build(gate=True, k=2, seed=2), x["input_ids"].shape[1]
    more = torch.tensor([[7, 8, 9, 10]])
    with method(model) as trace:
        out = model.generate(**x, **GENERATE | {"max_new_tokens": 9})
        gate = out.past_key_values.sparsevlm.at(2).gate[0, -8:]
        ids = torch.cat([out.sequences, more], 1)
        mask = torch.ones_like(ids)
        second = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, **GENERATE | {"max_new_tokens": 3}
        )
    assert gate.any() and not gate.all()
    hidden = [n + i for i, written in enumerate(gate.tolist()) if not written]
    kept = trace.prefills[0].stages[0].origin[0] + 5
    ids = second.sequences[:, :-1]
    rows = [*range(5), *kept.tolist(), *range(5 + PATCHES, ids.shape[1])]
    text = model.model.language_model
    states = model(input_ids=ids, pixel_values=x["pixel_values"], output_hidden_states=True).hidden_states[2][:, rows]
    rope = text.rotary_emb(states, position_ids=torch.tensor([rows]))
    unseen = torch.ones(len(rows), len(rows)).triu(1).bool()
    predictor = method.attach(locate(model))
    written = method.writes(predictor, states[:, -2:])[0].tolist()  # the second answer's first two tokens
    hidden += [ids.shape[1] - 2 + i for i, kept in enumerate(written) if not kept]
    for row in map(rows.index, hidden):
        unseen[row + 1 :, row] = True
    mask = torch.zeros(unseen.shape, dtype=states.dtype).masked_fill(unseen, torch.finfo(states.dtype).min)[None, None]
    for layer in text.layers[2:]:
        states = layer(states, attention_mask=mask, position_embeddings=rope)
    want = model.lm_head(text.norm(states))[0, -3:]
    same(logits(second)[0], want.float(), 1e-5)


def test_gate_with_beams_and_prompts_of_which_some_have_no_picture():
    model = llava()
    x, rows = inputs("ragged", model)
    options = GENERATE | {"num_beams": 3}
    with build(gate=True)(model):
        cached, uncached = (model.generate(**x, **options, use_cache=use).sequences for use in (True, False))
        greedy = model.generate(**x, **GENERATE)
        assert torch.equal(cached, uncached)
        for b in range(3):
            same(logits(model.generate(**single(x, rows, b), **GENERATE))[0], logits(greedy)[b])
    with build()(model):
        assert not torch.equal(logits(model.generate(**x, **GENERATE))[:2], logits(greedy)[:2])


def test_gate_refuses_assisted_decoding():
    model = llava()
    x, _ = inputs("one", model)
    x["input_ids"][:, 5 + PATCHES :] = 7  # so that something is looked up
    with build(gate=True)(model), pytest.raises(ValueError, match="one at a time.* Use gate=False"):
        model.generate(**x, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)


def written_file(folder: Path, model, rate: float = 0.25, text: bool = True, **facts) -> Path:
    """A file for a tiny model, with random weights."""
    family = locate(model)
    sizes = Sizes.of(64) if text else Sizes(64, 64, 4, 128, 1, 0)
    known = {"method": "dynamic_llava", "hidden": 64, "n_layers": family.n_layers, "layer": 2, "heads": 4, "rate": rate}
    known |= {"fingerprint": fingerprint(family.outer)} | facts
    return write_modules(folder / "predictor.safetensors", Predictors(sizes).start(0).state_dict(), known)


def test_a_file_sets_layer_and_share_and_says_when_the_share_is_another(tmp_path, recwarn):
    model = llava()
    x, _ = inputs("one", model)
    path = str(written_file(tmp_path, model))
    with sparsevlm.build("dynamic_llava", predictor=path)(model) as trace:
        model(**x)
    (stage,) = trace.prefills[0].stages
    assert (stage.layer, stage.tokens_out) == (1, [9])
    assert not recwarn.list
    with sparsevlm.build("dynamic_llava", predictor="untrained")(model):
        with pytest.raises(ValueError, match="was trained for no share of the tokens. Use a budget, or keep"):
            model(**x)
    with pytest.warns(UserWarning, match="keeps 0.500 of the visual tokens .* trained to keep 0.250 .off-distribution"):
        with sparsevlm.build("dynamic_llava", predictor=path, keep=18)(model):
            model(**x)
    with pytest.warns(UserWarning, match="trained on a model with other weights"):
        with sparsevlm.build("dynamic_llava", predictor=path)(llava(seed=1)):
            pass


def test_what_does_not_fit_is_refused(tmp_path):
    model = llava()

    def refused(message: str, error=ValueError, on=model, **options):
        with pytest.raises(error, match=message), sparsevlm.build("dynamic_llava", **options)(on):
            pass

    refused(r"trained, and modules are shipped for the model `mini` only. Use predictor=<file>, or make one: python -m")
    refused("no file of modules .*nowhere.*", FileNotFoundError, predictor="nowhere")
    path = written_file(tmp_path, model)
    refused("number of layers 8, this one has 6. Use", on=llava(layers=6), predictor=str(path))
    refused("of width 64, this one has 32. Use", on=llava(hidden_size=32), predictor=str(path))
    refused("layer 7 does not fit a model of 8 layers. Use k=1 ... 6", predictor=str(path), k=7)
    stored = load_file(path)
    for facts, message in (
        ({"method": "atp_llava"}, "holds modules of atp_llava, not of dynamic_llava"),
        ({"layer": "two"}, re.escape("says layer = 'two'. Use a whole file")),
    ):
        refused(message, predictor=str(written_file(tmp_path, model, **facts)))
    save_file(stored, path, {"format": "pt"})
    refused("is no file of modules", predictor=str(path))
    path.write_bytes(path.read_bytes()[:1000])
    refused("is damaged or no safetensors file", predictor=str(path))
    refused("gate=True needs an output predictor", predictor=str(written_file(tmp_path, model, text=False)), gate=True)
    facts = {"method": "dynamic_llava", "hidden": 64, "n_layers": 8, "layer": 2, "heads": 4, "rate": 0.2}
    name = "image_score_predictor.down_mlp.1.weight"
    for tensors, message in (
        ({k: v for k, v in stored.items() if "qkv" not in k}, "does not hold Dynamic-LLaVA's predictors"),
        ({**stored, name: stored[name] * float("nan")}, "weights that are infinite or no numbers .image_score"),
    ):
        refused(message, predictor=str(write_modules(path, tensors, facts | {"fingerprint": fingerprint(model.model)})))
    (tmp_path / "config.json").write_text("{}")
    refused("holds no weights model.image_score_predictor", predictor=str(tmp_path))


def test_scores_that_are_no_numbers_are_refused():
    model = llava()
    x, _ = inputs("one", model)
    x["pixel_values"][:] = float("nan")
    with build()(model), pytest.raises(ValueError, match="scores are no numbers"):
        model(**x)
