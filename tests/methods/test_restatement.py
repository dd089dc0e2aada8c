"""Our methods equal an independent, plain restatement of the authors' code, beyond the recorded runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsevlm
from tests.goldens.load import files, llama, prompt, recorded_model_and_prompt, recording, stem
from tests.methods.test_goldens import noise_of
from tests.restatement import Result, Rule, authors_forward
from tests.tiny import EARLY_DROP, GENERATE, IMAGE, PATCHES, inputs, llava, logits, same

V15 = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
LAYERS = (2, 6, 15)


@pytest.mark.recordings
@pytest.mark.parametrize("path", files("cases"), ids=stem)
def test_the_restatement_equals_the_recorded_runs(path):
    meta, g = recording(path)
    if not meta["stable"]:
        pytest.skip("rounding decides this run")
    model, embeds, _ = recorded_model_and_prompt(meta)
    keep = meta.get("keep_list")
    rule = Rule(
        layers=tuple(meta["pruning_loc"]),
        keep=None if keep is None else tuple(keep),
        scale=meta.get("scale"),
        bias=meta.get("bias", 0.0),
        plus=meta.get("use_version") == "2_0",
    )
    noise = noise_of(meta, g)
    got = authors_forward(model.model, model.lm_head, embeds[0], meta["pre"], meta["n_vis"], rule, 5, noise)
    assert np.array_equal(got.raters, g["raters"]) and got.cached == g["kv_len"].tolist()
    for j, cut in enumerate(got.cuts):
        assert np.array_equal(cut.kept, g[f"p{j}_keep_local"]) and np.array_equal(
            cut.positions, g[f"p{j}_positions_out"]
        )
        np.testing.assert_allclose(cut.scores, g[f"p{j}_scores"], rtol=0, atol=1e-5 * np.abs(g[f"p{j}_scores"]).max())
        if g.get(f"p{j}_n_merged") == 2 and not noise:
            return  # ties, see test_goldens.py
    assert got.ids == g["gen_ids"].tolist()
    np.testing.assert_allclose(got.logits, g["gen_logits"], rtol=0, atol=5e-5)


def ours(method, model, embeds, visual, steps=3):
    with method(model, visual_mask=visual) as trace:
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(visual, dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return trace.prefills[0], out


def compare(got, want: Result, first_text: int, tolerance: float) -> None:
    """A record and a generate() output of ours with the restatement; `tolerance` of scores, relative to the largest."""
    record, out = got
    assert torch.equal(record.raters[0] - first_text, want.raters)
    assert len(record.stages) == len(want.cuts)
    for stage, cut in zip(record.stages, want.cuts, strict=True):
        assert torch.equal(stage.kept[0], cut.kept)
        assert stage.recycled[0] == len(cut.merged) and stage.tokens_out[0] == len(cut.kept) + len(cut.merged)
        if stage.scores[0] is not None:
            atol = tolerance * float(cut.scores.abs().max())
            torch.testing.assert_close(stage.scores[0], cut.scores, rtol=0, atol=atol)
    steps = len(want.ids)
    assert [layer.keys.shape[2] - steps + 1 for layer in out.past_key_values.layers] == want.cached
    assert out.sequences[0, -steps:].tolist() == want.ids
    torch.testing.assert_close(logits(out)[0], want.logits.float(), rtol=0, atol=5e-5)


CASES = [
    *(
        ("v1.5", "A", seed, budget, 576, text)
        for budget, seed, text in zip(V15, (3, 4, 5, 6), (31, 9, 50, 2), strict=True)
    ),
    ("v1.5", "C", 7, 128, 576, 17),
    ("v1.5", "A", 8, 192, 144, 17),  # fewer visual tokens than may be kept
    ("plus", "B", 3, 96, 260, 12),
    ("plus", "Bp", 4, 64, 200, 30),  # the kernel changes its sign
    ("v1.0", "D", 5, (4.0, 20.0), 576, 25),
    ("v1.0", "D", 6, (0.8, 0.0), 300, 12),
    ("video", "C", 7, None, 512, 19),
]


@pytest.mark.filterwarnings("ignore:SparseVLM")
@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("variant,config,seed,setting,n_visual,n_text", CASES)
def test_every_variant_equals_the_restatement(variant, config, seed, setting, n_visual, n_text, options):
    # where the kernel is close to zero, scores hang on its rounding: compare in the authors' float32
    dtype = torch.float32 if variant == "plus" else torch.float64
    model = llama(config, seed).to(dtype)
    try:
        embeds, visual = prompt(config, seed, 35, n_visual, n_text)
        embeds = embeds.to(dtype)
        if variant == "v1.5":
            rule = Rule(LAYERS, V15[setting])
            method = sparsevlm.build("sparsevlm", layers=LAYERS, keep=V15[setting], always_drop=True, **options)
        elif variant == "plus":
            rule = Rule(LAYERS, PLUS[setting], plus=True)
            method = sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=PLUS[setting], always_drop=True, **options)
        elif variant == "v1.0":
            rule = Rule((*LAYERS, 19), scale=setting[0], bias=setting[1])
            method = sparsevlm.build("sparsevlm_rank", rule="v1.0", layers=(*LAYERS, 19), scale=setting[0],
                                     bias=setting[1], **options)  # fmt: skip
        else:
            rule = Rule((1,))
            method = sparsevlm.build("sparsevlm_rank", rule="video", layers=(1,), **options)
        want = authors_forward(model.model, model.lm_head, embeds[0], 35, n_visual, rule)
        compare(ours(method, model, embeds, visual), want, 35 + n_visual, 1e-5 if variant == "plus" else 1e-9)
    finally:
        model.float()


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("seed", range(6))
def test_llava_equals_the_restatement(seed, options):
    """Through the whole of LLaVA, with grouped-query attention."""
    model = llava(seed=seed)
    x, _ = inputs("one", model, seed=seed)
    at = (x["input_ids"][0] == IMAGE).nonzero()[:, 0]
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(x["pixel_values"], return_dict=True).pooler_output))
        embeds = model.get_input_embeddings()(x["input_ids"][0])
    embeds[at] = features
    layers, keep = (1, 3, 5), (18, 10, 5)
    want = authors_forward(
        model.model.language_model, model.lm_head, embeds, int(at[0]), PATCHES, Rule(layers, keep), steps=1
    )
    with sparsevlm.build("sparsevlm", layers=layers, keep=keep, **options)(model) as trace:
        out = model.generate(**x, **GENERATE | {"max_new_tokens": 1})
    stages = trace.prefills[0].stages
    assert [s.kept[0].tolist() for s in stages] == [c.kept.tolist() for c in want.cuts]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == want.cached
    same(logits(out)[0].double(), want.logits, 1e-6)
