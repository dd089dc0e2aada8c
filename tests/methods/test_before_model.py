"""Methods that act before the language model: what they hand on, and how a budget is spent."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, DynamicCache, LlavaConfig, LlavaForConditionalGeneration

import sparsevlm
from tests.tiny import GENERATE, IMAGE, PATCHES, inputs, llava, logits, pad, prompt, same, text_config, video_llava

PROJECTED = ["divprune", "folder_simple", "holov", "restore"]  # they work on what the projector makes
METHODS = ["downsample", "fastervlm", "ficoco_v", "folder", "scope", "tome", "visionzip", "vispruner", *PROJECTED]
SELECTING = ["divprune", "fastervlm", "scope", "vispruner"]  # they hand on tokens as they are


def deep(layers: int = 5, seed: int = 0) -> LlavaForConditionalGeneration:
    """LLaVA with a tower of several blocks: 36 patches, the last block but one is read; attention far from uniform."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, image_size=42,
        patch_size=7, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(layers=2), image_token_index=IMAGE, image_seq_length=PATCHES
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval().double()
    for name, p in model.model.vision_tower.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            p.data = torch.randn_like(p) * 0.35
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.requires_grad_(False)


def handed_on(model, method, x, **kwargs):
    """What the projector computes, the trace, and the logits."""
    seen = []
    with method(model) as trace, torch.no_grad():
        hook = model.model.multi_modal_projector.linear_1.register_forward_pre_hook(
            lambda m, args: seen.append(args[0])
        )
        out = model(**x, **kwargs).logits
        hook.remove()
    return seen, trace, out


def features(model, pixels, **kwargs):
    out = model.model.vision_tower(pixels, output_hidden_states=True, **kwargs)
    return out.hidden_states[model.config.vision_feature_layer]


def attentions(model, pixels) -> torch.Tensor:
    """[n, H, 1 + P, 1 + P] of the layer whose output is read, by the eager backend."""
    model.set_attn_implementation({"vision_config": "eager"})
    out = model.model.vision_tower(pixels, output_attentions=True).attentions[model.config.vision_feature_layer]
    model.set_attn_implementation({"vision_config": "sdpa"})
    return out


# ---- the mechanism ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_projector_computes_only_what_is_kept_and_the_trace_adds_up(name):
    model = deep()
    x, _ = inputs("multi", model)
    seen, trace, _ = handed_on(model, sparsevlm.build(name, budget=20), x)
    left = trace.prefills[0].stages[0].tokens_out[0]
    assert left == (18 if name == "downsample" else 20)
    assert sum(s.numel() // s.shape[-1] for s in seen) == (2 * PATCHES if name in PROJECTED else left)
    stage = trace.prefills[0].stages[0]
    kept = stage.kept[0]
    assert stage.layer == -1 and stage.tokens_in == [2 * PATCHES]
    assert len(kept) + stage.recycled[0] == left
    assert torch.equal(kept, kept.unique()) and kept.max() < 2 * PATCHES and torch.equal(kept, stage.origin[0])
    assert {int(k) // PATCHES for k in kept} == {0, 1}


@pytest.mark.parametrize("name", SELECTING)
def test_pruned_prompt_is_the_short_prompt(name):
    """Selecting tokens equals a prompt that never had the others."""
    model = deep()
    x, _ = inputs("one", model)
    _, trace, out = handed_on(model, sparsevlm.build(name, budget=10), x)
    kept = trace.prefills[0].stages[0].kept[0]
    states = features(model, x["pixel_values"])[:, 1:]
    embeds = model.get_input_embeddings()(x["input_ids"])
    start = x["input_ids"][0].tolist().index(IMAGE)
    pictures = model.model.multi_modal_projector(states)[:, kept]
    short = torch.cat([embeds[:, :start], pictures, embeds[:, start + PATCHES :]], 1)
    same(model(inputs_embeds=short).logits[:, -1], out[:, -1])


@pytest.mark.parametrize("name", METHODS)
def test_beams_and_sampling(name):
    model = llava()
    x, _ = inputs("ragged", model)
    method = sparsevlm.build(name, budget=18)
    with method(model) as trace:
        for options in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)):
            model.generate(**x, **GENERATE | options)
            record = trace.prefills[-1]
            left = [s if n else 0 for s, n in zip(record.leaving, record.n_visual, strict=True)]
            want = {"downsample": (16, 18)}.get(name, (18, 18))
            copies = len(left) // 3
            assert left == [want[0]] * copies + [want[1]] * copies + [0] * copies
            for b in range(0, len(left), copies):  # copies of a prompt have the same tokens
                assert all(torch.equal(record.stages[0].kept[b], record.stages[0].kept[b + i]) for i in range(copies))


def test_second_turn_with_a_new_picture_equals_one_prompt():
    model = llava(layers=2)
    x, rows = inputs("multi", model)
    method = sparsevlm.build("visionzip", dominant=7, contextual=2)
    with method(model) as trace:
        whole = model(**x).logits
        first = rows[0].index(IMAGE) + PATCHES + 3
        cache = DynamicCache(config=model.config.text_config)
        model(input_ids=x["input_ids"][:, :first], pixel_values=x["pixel_values"][:1], past_key_values=cache)
        again = model(input_ids=x["input_ids"][:, first:], pixel_values=x["pixel_values"][1:], past_key_values=cache)
    same(whole[:, -1], again.logits[:, -1])
    assert [p.leaving for p in trace.prefills] == [[18], [9], [9]]
    assert cache.layers[0].keys.shape[2] == len(rows[0]) - 2 * (PATCHES - 9)


def test_generate_counts_only_new_pictures_of_a_second_turn():
    model = llava(layers=2)
    x, rows = inputs("multi", model)
    first = rows[0].index(IMAGE) + PATCHES + 3
    with sparsevlm.build("fastervlm", budget=9)(model) as trace:
        ids, pixels = x["input_ids"], x["pixel_values"]
        one = model.generate(input_ids=ids[:, :first], pixel_values=pixels[:1], **GENERATE | dict(max_new_tokens=1))
        model.generate(input_ids=ids, pixel_values=pixels[1:], past_key_values=one.past_key_values, **GENERATE)
    assert [p.leaving for p in trace.prefills] == [[9], [9]]


def test_a_budget_is_shared_by_the_pictures_of_a_prompt():
    model = llava()
    x, _ = inputs("ragged", model)
    _, trace, _ = handed_on(model, sparsevlm.build("fastervlm", budget=11), x)
    one, two, none = trace.prefills[0].stages[0].kept
    assert len(one) == 11 and len(none) == 0
    assert [(two < PATCHES).sum().item(), (two >= PATCHES).sum().item()] == [6, 5]


def test_a_budget_is_shared_by_the_frames_of_a_video():
    model = video_llava()
    torch.manual_seed(3)
    ids, mask = pad([prompt([5, "V", 9]), prompt([3, "I", 7], 16)])
    x = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(1, 3, 28, 28).double(),
             pixel_values_videos=torch.randn(1, 8, 3, 28, 28).double())  # fmt: skip
    _, trace, _ = handed_on(model, sparsevlm.build("fastervlm", budget=13), x)
    video, image = trace.prefills[0].stages[0].kept
    assert len(image) == 13
    assert torch.bincount(video // 17, minlength=8).tolist() == [2] * 5 + [1] * 3
    assert (video % 17 != 0).all()  # CLS of a frame goes first
    assert trace.prefills[0].stages[0].scores[0].isinf().sum() == 8
    _, few, _ = handed_on(model, sparsevlm.build("tome", budget=3), x)  # fewer tokens than frames
    assert few.prefills[0].leaving == [3, 3]


def test_image_and_video_in_one_prompt():
    model = video_llava()
    ids = torch.tensor([prompt([4, "I", 2, "V", 5], 16)])
    x = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28).double(),
             pixel_values_videos=torch.randn(1, 8, 3, 28, 28).double())  # fmt: skip
    for name in METHODS:
        seen, trace, _ = handed_on(model, sparsevlm.build(name, budget=36), x)
        assert trace.prefills[0].leaving == [36], name  # nine pictures, four each


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_refusals(name):
    model = llava()
    x, _ = inputs("one", model)
    method = sparsevlm.build(name, budget=9)
    encoded = model.model.get_image_features(x["pixel_values"])
    without = {k: v for k, v in x.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="encoded without it"), method(model):
        model(**without, mm_encoder_outputs={"image": encoded})
    model.model.config.vision_feature_layer = [-1, -2]
    with pytest.raises(ValueError, match="features of one layer"), method(model):
        pass
    model.model.config.vision_feature_layer = -3
    with pytest.raises(ValueError, match="no output of the tower's 2 layers"), method(model):
        pass


def test_refusals_of_options():
    for name, options in [
        ("visionzip", dict(dominant=5)),
        ("visionzip", dict(budget=9, dominant=5, contextual=2)),
        ("visionzip", dict(dominant=0, contextual=2)),
        ("vispruner", dict(budget=9, ratio=1.5)),
        ("vispruner", dict(budget=9, step=0)),
        ("downsample", dict(budget=9, side=3)),
        ("downsample", dict(budget=9, of="paper")),
        ("ficoco_v", dict(budget=9, lam=2)),
        ("ficoco_v", dict(budget=9, window=0)),
    ]:
        with pytest.raises(ValueError, match="|".join(options)):
            sparsevlm.build(name, **options)
    model, video = llava(), video_llava()
    with pytest.raises(ValueError, match="side 7 must be between 1 and the tower's 6"):
        sparsevlm.build("downsample", side=7)(model).__enter__()
    with pytest.raises(ValueError, match="start 1 must be between 0 and 0"):
        sparsevlm.build("ficoco_v", budget=9, start=1)(model).__enter__()
    x = dict(input_ids=torch.tensor([prompt(["V", 3])]), pixel_values_videos=torch.randn(1, 8, 3, 28, 28).double())
    with (
        pytest.raises(ValueError, match="less than a token for each of 8"),
        sparsevlm.build("downsample", budget=7)(video),
    ):
        video(**x)
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        sparsevlm.build("tome", budget=9)(model).__enter__()


# ---- what each method computes ---------------------------------------------------------------------------------------
def test_fastervlm_keeps_what_cls_attends_to():
    model = deep()
    x, _ = inputs("one", model)
    _, trace, _ = handed_on(model, sparsevlm.build("fastervlm", budget=10), x)
    want = attentions(model, x["pixel_values"])[0, :, 0, 1:].mean(0)
    stage = trace.prefills[0].stages[0]
    same(stage.scores[0], want, 1e-6)  # eager attention is softmaxed in float32
    assert torch.equal(stage.kept[0], want.topk(10).indices.sort().values)


def test_vispruner_is_part_fastervlm():
    model = deep()
    x, _ = inputs("one", model)
    kept = {}
    for ratio in (0.0, 0.5, 1.0):
        kept[ratio] = handed_on(model, sparsevlm.build("vispruner", budget=10, ratio=ratio), x)[1].prefills[0].stages[0]
    faster = handed_on(model, sparsevlm.build("fastervlm", budget=10), x)[1].prefills[0].stages[0].kept[0]
    five = handed_on(model, sparsevlm.build("fastervlm", budget=5), x)[1].prefills[0].stages[0].kept[0]
    assert torch.equal(kept[1.0].kept[0], faster)
    assert torch.isin(five, kept[0.5].kept[0]).all() and not torch.isin(five, kept[0.0].kept[0]).all()
    finer = handed_on(model, sparsevlm.build("vispruner", budget=10, step=1), x)[1].prefills[0].stages[0].kept[0]
    assert not torch.equal(finer, kept[0.5].kept[0])


def tome_by_hand(model, pixels, removed, proportional=True, folds=None, alpha=0.0):
    """Patches [t, d] after merging `removed[i]` tokens in block i, token by token; `folds`: passes within a block."""
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))[0]
    size = torch.ones(len(x), dtype=x.dtype)
    for layer, r in zip(tower.encoder.layers, removed, strict=False):
        a, h = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (p(h).view(len(x), a.num_heads, -1).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        weight = (q @ k.transpose(1, 2) * a.scale + (size.log() if proportional else 0)).softmax(-1)
        x = x + a.out_proj((weight @ v).transpose(0, 1).flatten(1))
        metric, cls = k.mean(0), weight[:, 0].mean(0)
        while r:
            now = min(r, (len(x) - 1) // 2)
            r -= now
            edges = []
            for i in range(2, len(x), 2):
                j = max(range(1, len(x), 2), key=lambda j, i=i: float(F.cosine_similarity(metric[i], metric[j], dim=0)))
                edges.append((float(F.cosine_similarity(metric[i], metric[j], dim=0) - 100 * alpha * cls[i]), i, j))
            edges.sort(reverse=True)
            groups = {i: [i] for i in range(len(x))}
            for _, i, j in edges[:now]:
                groups[j].append(i), groups.pop(i)
            order = [i for i in groups if i % 2 == 0] + [i for i in groups if i % 2]
            mean = [(x[groups[i]] * size[groups[i], None]).sum(0) / size[groups[i]].sum() for i in order]
            metric = torch.stack(
                [(metric[groups[i]] * size[groups[i], None]).sum(0) / size[groups[i]].sum() for i in order]
            )
            cls = torch.stack([cls[groups[i]].mean() for i in order])
            x, size = torch.stack(mean), torch.stack([size[groups[i]].sum() for i in order])
        x = x + layer.mlp(layer.layer_norm2(x))
    assert size.sum() == PATCHES + 1
    return x[1:]


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("budget,removed", [(10, [7, 6, 7, 6]), (2, [20, 8, 4, 2]), (1, [28, 4, 2, 1])])
def test_tome_token_by_token(budget, removed, proportional):
    model = deep()
    x, _ = inputs("one", model)
    seen, _, _ = handed_on(model, sparsevlm.build("tome", budget=budget, proportional=proportional), x)
    same(seen[0], tome_by_hand(model, x["pixel_values"], removed, proportional), 1e-6)
    assert seen[0].shape[0] == budget


@pytest.mark.parametrize("budget", [20, 10, 1])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.05])
def test_folder_token_by_token(budget, alpha):
    model = deep()
    x, _ = inputs("one", model)
    seen, _, _ = handed_on(model, sparsevlm.build("folder", budget=budget, alpha=alpha), x)
    want = tome_by_hand(model, x["pixel_values"], [0, 0, 0, 36 - budget], alpha=5.0 if alpha is None else alpha)
    same(seen[0], want, 1e-6)


@pytest.mark.parametrize("budget", [20, 10, 1])
def test_folder_simple_token_by_token(budget):
    model = deep()
    x, _ = inputs("one", model)
    _, trace, out = handed_on(model, sparsevlm.build("folder_simple", budget=budget), x)
    tokens = list(model.model.multi_modal_projector(features(model, x["pixel_values"])[:, 1:])[0])
    groups = [[i] for i in range(PATCHES)]
    while len(groups) > budget:
        mean = [torch.stack([tokens[i] for i in g]).mean(0) for g in groups]
        edges = []
        for i in range(0, len(groups), 2):
            near = [(float(F.cosine_similarity(mean[i], mean[j], dim=0)), j) for j in range(1, len(groups), 2)]
            edges.append((*max(near), i))
        edges.sort(reverse=True)
        now = min(len(groups) - budget, max((len(groups) - 1) // 2, 1))
        for _, j, i in edges[:now]:
            groups[j] += groups[i]
        gone = {i for _, _, i in edges[:now]}
        groups = [g for i, g in enumerate(groups) if i not in gone]
    want = torch.stack([torch.stack([tokens[i] for i in g]).mean(0) * (1 + math.log(len(g))) for g in groups])
    embeds = model.get_input_embeddings()(x["input_ids"])
    start = x["input_ids"][0].tolist().index(IMAGE)
    embeds = torch.cat([embeds[:, :start], want[None], embeds[:, start + PATCHES :]], 1)
    same(out[:, -1], model(inputs_embeds=embeds).logits[:, -1], 1e-9)
    assert trace.prefills[0].stages[0].kept[0].tolist() == [g[0] for g in groups]


def test_divprune_works_on_projected_tokens():
    model = deep()
    x, _ = inputs("one", model)
    _, trace, _ = handed_on(model, sparsevlm.build("divprune", budget=5), x)
    projected = model.model.multi_modal_projector(features(model, x["pixel_values"])[:, 1:])[0]
    distance = 1 - F.cosine_similarity(projected[:, None], projected[None], dim=-1)
    nearest = (distance + 9 * torch.eye(PATCHES)).amin(1)
    picked = [int(nearest.argmax())]
    while len(picked) < 5:
        picked.append(int(distance[picked].amin(0).argmax()))
    assert trace.prefills[0].stages[0].kept[0].tolist() == sorted(picked)


def test_downsample_of_features_is_area_averaging_and_of_pictures_a_smaller_picture():
    model = deep()
    x, _ = inputs("one", model)
    grid = features(model, x["pixel_values"])[0, 1:].view(6, 6, -1)
    seen, _, _ = handed_on(model, sparsevlm.build("downsample", side=3, of="features"), x)
    want = torch.stack([grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for i in range(3) for j in range(3)])
    same(seen[0], want, 1e-5)
    seen, trace, _ = handed_on(model, sparsevlm.build("downsample", side=3), x)
    small = F.interpolate(x["pixel_values"].float(), (21, 21), mode="bicubic", antialias=True).double()
    same(seen[0], features(model, small, interpolate_pos_encoding=True)[0, 1:], 1e-9)
    assert trace.prefills[0].stages[0].kept[0].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]


def test_ficoco_v_in_one_block_by_hand():
    model = deep()
    x, _ = inputs("one", model)
    method = sparsevlm.build("ficoco_v", budget=10, start=3, window=1)
    seen, trace, _ = handed_on(model, method, x)
    attention = attentions(model, x["pixel_values"])[0].mean(0)
    redundancy = 0.35 * attention[1:, 1:].mean(1) - 0.65 * attention[0, 1:]
    stay = redundancy.topk(10, largest=False).indices.sort().values
    assert torch.equal(trace.prefills[0].stages[0].kept[0], stay)
    tower, layer = model.model.vision_tower, model.model.vision_tower.encoder.layers[3]
    before = tower(x["pixel_values"], output_hidden_states=True).hidden_states[3]
    y = (before + layer.self_attn(layer.layer_norm1(before))[0])[0, 1:]
    top, bottom = y[stay].clone(), torch.ones(10, dtype=y.dtype)
    for i in set(range(PATCHES)) - set(stay.tolist()):
        j = attention[1:, 1:][i, stay].argmax()
        top[j] += y[i]
        bottom[j] += 1
    merged = top / bottom[:, None]
    same(seen[0], merged + layer.mlp(layer.layer_norm2(merged)), 1e-6)


ABLATIONS = [
    ("visionzip", dict(dominant=8, contextual=2), dict(dominant=10, contextual=0)),
    ("vispruner", {}, dict(ratio=1.0)),
    ("tome", {}, dict(proportional=False)),
    ("folder", {}, dict(alpha=0.0)),
    ("ficoco_v", {}, dict(lam=1.0)),
    ("ficoco_v", {}, dict(window=1)),
    ("ficoco_v", {}, dict(eps=0.5)),
    ("ficoco_v", {}, dict(start=3)),
    ("ficoco_v", {}, dict(merge=False)),
    ("downsample", {}, dict(of="features")),
]


@pytest.mark.parametrize("name,options,ablated", ABLATIONS)
def test_each_part_of_a_method_matters(name, options, ablated):
    model = deep()
    x, _ = inputs("batch", model)
    budget = {} if "dominant" in options else {"budget": 20}
    a = handed_on(model, sparsevlm.build(name, **budget, **options), x)[2]
    b = handed_on(model, sparsevlm.build(name, **budget, **ablated), x)[2]
    real = x["attention_mask"].bool()
    assert (a - b)[real].abs().max() > 1e-6


def test_methods_differ():
    model = deep()
    x, _ = inputs("one", model)
    out = [handed_on(model, sparsevlm.build(name, budget=12), x)[2][0, -1] for name in METHODS]
    for i, a in enumerate(out):
        assert all((a - b).abs().max() > 1e-6 for b in out[:i])


@pytest.mark.parametrize("name", METHODS)
def test_deep_tower_batch_equals_singles(name):
    model = deep()
    x, rows = inputs("ragged", model)
    method = sparsevlm.build(name, budget=9)
    with method(model):
        together = logits(model.generate(**x, **GENERATE))
        for b, first in enumerate((0, 1)):
            n = rows[b].count(IMAGE) // PATCHES
            one = dict(input_ids=torch.tensor([rows[b]]), pixel_values=x["pixel_values"][first : first + n])
            same(logits(model.generate(**one, **GENERATE)), together[b : b + 1])
