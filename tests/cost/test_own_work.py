"""What each method computes itself, recounted by hand, and that it is booked as the method's wherever it is done."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig

import sparsevlm
from sparsevlm.cost import counters, flops
from sparsevlm.cost.shapes import make_prompt
from tests.tiny import IMAGE, llava, text_config

N, TEXT, TAIL = 36, 14, 10  # visual tokens; text tokens; those of them after the picture
L = N + TEXT
D, HEADS, KV, WIDTH, MLP, LAYERS, VOCAB = 64, 4, 32, 16, 128, 6, 100  # language model; KV: width of all keys together
V, V_WIDTH, V_MLP, V_LAYERS = 32, 16, 64, 4  # tower: width, width of a head, MLP, layers; the last but one is read
SMALL = llava(layers=2)  # its tower has two layers
OPTIONS = {"layers": (1, 3), "keep": (18, 7)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Folder of a small LLaVA's config.json."""
    vision = CLIPVisionConfig(
        hidden_size=V, intermediate_size=V_MLP, num_hidden_layers=V_LAYERS, num_attention_heads=2, image_size=42,
        patch_size=7, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(layers=LAYERS), image_token_index=IMAGE, image_seq_length=N
    )
    config.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return str(folder)


COUNTS: dict[str, dict[str, float]] = {}


def count(model: str, method: str, budget, options: dict) -> dict[str, float]:
    """As `flops.count`, each setting once for all tests."""
    key = repr((model, method, budget, options))
    if key not in COUNTS:
        COUNTS[key] = flops.count(model, method, budget, TEXT, **options)
    return COUNTS[key]


def rows(queries: int, length: int) -> int:
    """Attention rows of so many queries over all heads."""
    return queries * length * D


def sparse_stage(length: int, pool: int, merged: int) -> int:
    """Rows of all text behind the picture, their weighted mean over raters, clustering and merging."""
    return rows(TAIL, length) + HEADS * TAIL * length + (pool * pool + merged * pool) * D


def all_rows_stage(length: int) -> int:
    """Rows of all tokens; the queries of those before the last text are computed for it alone."""
    return length * D * D + rows(length, length)


def next_layer_stage(length: int) -> int:
    """One row of the next layer, whose query and keys are computed for it alone."""
    return D * D + length * D * KV + rows(1, length) + HEADS * length


def text_stage(visual: int) -> int:
    """Rows of the text in the next layer, their mean, and the visual tokens' similarities."""
    length = TEXT + visual
    own = TAIL * D * D + length * D * KV
    return own + rows(TAIL, length) + HEADS * TAIL * length + visual * visual * D


def fold_stage(length: int, visual: int) -> int:
    """FiCoCo-L: text's mean, indirect correlation through the text, and folding the discarded tokens."""
    return all_rows_stage(length) + TAIL * visual + visual * TAIL * visual + visual * visual * D


def matching(tokens: int, width: int) -> int:
    """Every other token against those between."""
    return (tokens - tokens // 2) * (tokens // 2) * width


def merging(tokens: int, r: int, *widths: int) -> int:
    """One-hot sums of r tokens into half of the others, for each of several tensors."""
    return sum(tokens // 2 * r * width for width in widths)


def aim(*visual: int) -> int:
    """16 of 36 merged by their whole keys; stages with so many visual tokens, of five multiplications by all rows."""
    stages = (all_rows_stage(TEXT + n) + 5 * HEADS * (TEXT + n) ** 2 for n in visual)
    return matching(N, V) + merging(N, 16, V, 1, V, 1) + sum(stages)


def dropped_rows(queries: int, length: int) -> int:
    """Attention of rows that the layer does not compute: their queries are computed for it alone."""
    return queries * D * D + rows(queries, length)


def image_predictor(tokens: int, width: int = 64, inner: int = 128) -> int:
    """Down, one block of attention among the tokens and feed-forward, and the head of three layers, on each token."""
    block = 4 * width * width + 2 * width * inner + 2 * tokens * width
    return tokens * (D * width + block + width * width // 2 + width * width // 8 + width // 4 * 2)


RATERS = N * TAIL * D
CLS_ROW = (1 + N) * V
OWN = [
    # method, budget, options, multiply-adds
    ("none", "full", {}, 0),
    ("random", 12, {}, 0),
    ("random_layer", None, {"k": 2, "keep": 9}, 0),
    ("downsample", 12, {}, 0),
    ("downsample", 12, {"of": "features"}, 0),
    ("fastv", None, {"k": 2, "keep": 9}, rows(1, L) + HEADS * L),
    ("fastv", None, {"k": 2, "keep": 9, "early_drop": False}, rows(1, L) + HEADS * L),
    # dropped 18 and 13, of which int(.8 n) + 1 = 15 and 11 are merged into int(.1 n) + 1 = 2 each
    *(
        ("sparsevlm", None, {**OPTIONS, "recycle": 0.8, "early_drop": early},
         RATERS + sparse_stage(L, 15, 2) + sparse_stage(TEXT + 20, 11, 2))
        for early in (True, False)
    ),
    ("sparsevlm", None, {**OPTIONS, "recycle": 0, "raters": "all"}, sparse_stage(L, 0, 0) + sparse_stage(32, 0, 0)),
    ("sparsevlm", None, {**OPTIONS, "recycle": 0, "raters": "prior"},
     sum(rows(TAIL, TEXT + n) + TAIL * n for n in (N, 18))),
    ("sparsevlm", None, {**OPTIONS, "recycle": 0, "raters": "tokens"}, all_rows_stage(L) + all_rows_stage(32)),
    # the kernel between text and visual tokens, and the mean over raters in 14/32 of the heads (2) and visual columns
    ("sparsevlm_plus", None, OPTIONS,
     RATERS + sum(rows(TAIL, TEXT + n) + TAIL * n * WIDTH + 2 * TAIL * n for n in (N, 18))),
    # keeps the rank; of 25 dropped int(.3 n) + 1 = 8 become one
    ("sparsevlm_rank", None, {"rank": 11, "rule": "video", "layers": (1,)},
     RATERS + rows(TAIL, L) + HEADS * TAIL * L + 8 * D),
    ("sgl", None, {"k": 2, "keep": 9, "guide": "self"}, 0),  # what the guide does is counted apart
    # cosines of all tokens and of the words, what the words point at, its blur; rows of text, their mean, cosines of 18
    ("signpost", None, {"keep": (18, 7), "layer": 2},
     N * N * D + TAIL * N * D + TAIL * N + 2 * 6**3 + rows(TAIL, TEXT + 18) + HEADS * TAIL * (TEXT + 18) + 18 * 18 * D),
    ("pyramiddrop", None, {"layers": (1, 3), "ratios": (0.5, 0.25)}, next_layer_stage(L) + next_layer_stage(TEXT + 18)),
    ("dart", None, {"k": 2, "keep": 12}, L * D * KV + (4 + 4) * N * D),
    ("dynamic_llava", None, {"predictor": "untrained", "k": 2, "keep": 12}, image_predictor(N)),
    ("ficoco_l", None, {"start": 3, "r": 20}, fold_stage(L, N) + fold_stage(TEXT + 16, 16)),
    ("aim", None, {"merge_to": 20, "first": 3, "last": 4, "start": "kept"}, aim(20, 10)),
    # the 10 dropped tokens go through the first of the two layers (its values are computed again); the second asks them
    ("aim", None, {"merge_to": 20, "first": 3, "last": 4},
     aim(20, 10) + dropped_rows(10, TEXT + 20) + (TEXT + 20) * D * KV + rows(10, TEXT + 20) + 10 * (D * D + 3 * D * MLP)
     + dropped_rows(10, TEXT + 10) + HEADS * 10 * (TEXT + 10)),
    # 8 in each of three blocks: by keys, whose means and sizes, then states, their sizes and new sizes
    ("tome", 12, {}, sum(matching(n, V_WIDTH) + merging(n, 8, V_WIDTH, 1, V, 1, 1) for n in (37, 29, 21))),
    # 17 of 36 and 7 of 19 projected tokens: their means, and the sizes of old and new ones
    ("folder_simple", 12, {},
     matching(36, D) + merging(36, 17, D, 1, 1) + matching(19, D) + merging(19, 7, D, 1, 1)),
    ("folder", 20, {}, CLS_ROW + matching(37, V_WIDTH) + merging(37, 16, V_WIDTH, 1, 1, 1, V, 1, 1)),
    # 12 in each of two blocks: the attention of all, and the discarded into the others
    ("ficoco_v", 12, {"start": 1}, (37 * 37 + 24 * 12) * V + (25 * 25 + 12 * 12) * V),
    # 12 patches beside CLS, 3 of the other 24 are targets
    ("visionzip", 16, {}, CLS_ROW + 21 * 3 * V_WIDTH + 3 * 21 * V),
    ("fastervlm", 12, {}, CLS_ROW),
    ("vispruner", 12, {}, CLS_ROW + N * N * V),
    ("divprune", 12, {}, N * N * D),
    ("scope", 12, {}, CLS_ROW + N * N * V),
    ("holov", 12, {}, CLS_ROW),
    ("mmtok", 12, {}, TEXT * N * D + N * N * V),  # as if every text token were a word
    # 6 kept; the 30 others are compared and merged into 6; distances of all rows by their 16 sines and cosines
    ("restore", 12, {}, CLS_ROW + 30 * 30 * D + 6 * 30 * D + (TEXT + 12) ** 2 * WIDTH),
    ("restore", 12, {"base": "divprune", "calibrate": False}, N * N * D + 30 * 30 * D + 6 * 30 * D),
    # patches, 12 and 6 tokens are compared; the text rates those in layers 2 and 5
    ("tops", None, {"tokens": 6}, CLS_ROW + N * N * D + text_stage(12) + text_stage(6)),
    # attention of two blocks; all patches join 22 by their projections; 22 tokens are rated in layer 3
    ("vscan", 12, {}, 2 * CLS_ROW + 2 * N * 22 * D + next_layer_stage(TEXT + 22)),
    ("yopo", None, {"cut": 3, "ffn": 0.5}, 0),
]  # fmt: skip
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(OWN)]


@pytest.mark.parametrize(("method", "budget", "options", "own"), OWN, ids=IDS)
def test_own_work_recounted_by_hand(model, method, budget, options, own):
    assert count(model, method, budget, options)["method"] * 1e9 == pytest.approx(own, abs=1e-3)


def test_every_method_is_recounted():
    pictures_decide = {"atp_llava"}  # how many tokens there are to compute is unknown without running the model
    assert {name for name, *_ in OWN} == {*sparsevlm.methods()} - {"anchorprune", "cdpruner"} - pictures_decide


def layer_macs(n: int) -> int:
    """A decoder layer that computes n rows; keys and values are half as wide as queries."""
    return n * (2 * D * D + 2 * D * KV) + 2 * n * n * D + 3 * n * D * MLP


def tower_macs(*tokens: tuple[int, int]) -> int:
    """Patches, then layers of so many tokens in attention and in the MLP."""
    layers = sum(n * 4 * V * V + 2 * n * n * V + 2 * m * V * V_MLP for n, m in tokens)
    return N * 7 * 7 * 3 * V + layers


def guide_macs(layers: int, answer: int) -> int:
    """A guide's layers on the whole prompt, the head for each new token, all of which but the last go through the
    layers; and the rows from the last visual token on, whose attention is computed once more."""
    prompt = layers * (layer_macs(L) + rows(1 + TAIL, L))
    steps = (layers * (2 * D * D + 2 * D * KV + 3 * D * MLP + 3 * rows(1, L + i)) for i in range(1, answer))
    return prompt + answer * D * VOCAB + sum(steps)


OWN_TOWER = tower_macs(*[(1 + N, 1 + N)] * 2) + N * (V * D + D * D)
GUIDES = [  # options, multiply-adds
    ({"guide": "self", "answer_tokens": 0, "layers": 2}, guide_macs(2, 0)),
    ({"guide": "self", "answer_tokens": 3}, guide_macs(6, 3)),
    ({"guide": SMALL, "answer_tokens": 3}, guide_macs(2, 3) + OWN_TOWER),
    ({"guide": SMALL, "answer_tokens": 0}, guide_macs(2, 0) + OWN_TOWER),
    ({"guide": SMALL, "answer_tokens": 3, "shared": True}, guide_macs(2, 3)),
]


@pytest.mark.parametrize(("options", "macs"), GUIDES)
def test_guide_recounted_by_hand_and_added_to_the_prefill(model, options, macs):
    plan = {"k": 2, "keep": 9}
    found, fastv = count(model, "sgl", None, plan | options), count(model, "fastv", None, plan)
    assert found["guide"] * 1e9 == pytest.approx(macs, abs=1e-3)
    assert found["method"] == 0 and fastv["guide"] == 0
    for part in ("llm_prefill", "vision", "projector", "decode"):
        assert found[part] == pytest.approx(fastv[part])
    assert flops.prefill_gmacs(found) == pytest.approx(found["llm_prefill"] + found["guide"])
    assert flops.first_token_gmacs(found) == pytest.approx(sum(found.values()) - found["decode"])
    net = counters.meta_model(model)
    prompt = make_prompt(net.config, TEXT, device="meta", dtype=net.dtype)
    prefill = counters.Prefill(net, tuple(prompt.inputs))
    with counters.countable(net), sparsevlm.build("sgl", **plan, **options)(net, prompt.visual_mask):
        by_torch = flops.split(counters.torch_gmacs(prefill, tuple(prompt.inputs.values())), net)
    assert by_torch == pytest.approx({part: found[part] for part in by_torch}, rel=1e-9)


WHOLE, CALL = (1 + N, 1 + N), (1, 1)  # CALL: a layer's call of one token, in whose place the method computes the layer
TOWERS = [
    ("none", "full", {}, tower_macs(*[WHOLE] * 4), N),
    ("divprune", 12, {}, tower_macs(*[WHOLE] * 4), N),
    ("vispruner", 12, {}, tower_macs(*[WHOLE] * 4), 12),
    ("tome", 12, {}, tower_macs((37, 29), (29, 21), (21, 13), (13, 13), *[CALL] * 3), 12),
    ("folder", 20, {}, tower_macs(WHOLE, WHOLE, (37, 21), (21, 21), CALL), 20),
    ("ficoco_v", 12, {"start": 1}, tower_macs(WHOLE, (37, 25), (25, 13), (13, 13), CALL, CALL), 12),
    ("downsample", 9, {}, tower_macs(*[(10, 10)] * 4) - (N - 9) * 7 * 7 * 3 * V, 9),
]


@pytest.mark.parametrize(("method", "budget", "options", "tower", "projected"), TOWERS, ids=[t[0] for t in TOWERS])
def test_tower_projector_and_language_model_are_the_models_own(model, method, budget, options, tower, projected):
    parts = {name: 1e9 * value for name, value in count(model, method, budget, options).items()}
    left = N if budget == "full" else budget
    assert parts["vision"] == pytest.approx(tower, abs=1e-3)
    assert parts["projector"] == pytest.approx(projected * (V * D + D * D), abs=1e-3)
    assert parts["llm_prefill"] == pytest.approx(LAYERS * layer_macs(TEXT + left) + D * VOCAB, abs=1e-3)


@pytest.mark.parametrize("early", [False, True])
def test_inside_the_language_model_only_the_layers_are_its_own(model, early):
    """Plain: the layers on the lengths that enter them. Early drop: a pruning layer makes all keys and values, and
    computes queries, attention, output and MLP of the rows that outlive it."""
    options = {**OPTIONS, "recycle": 0, "early_drop": early}
    lengths = [L, L, *[TEXT + 18] * 2, *[TEXT + 7] * (LAYERS - 4)]
    own = [layer_macs(n) for n in lengths]
    if early:
        for i, n, left in ((1, L, TEXT + 18), (3, TEXT + 18, TEXT + 7)):
            own[i] = n * 2 * D * KV + left * (2 * D * D + 3 * D * MLP) + 2 * left * n * D
    found = count(model, "sparsevlm", None, options)
    assert found["llm_prefill"] * 1e9 == pytest.approx(sum(own) + D * VOCAB, abs=1e-3)


@pytest.mark.parametrize(("method", "budget", "options"), [o[:3] for o in OWN if o[0] != "sparsevlm_rank"], ids=str)
def test_both_counters_agree_on_every_method(model, method, budget, options):
    net = counters.meta_model(model)
    prompt = make_prompt(net.config, TEXT, device="meta", dtype=net.dtype)
    prefill = counters.Prefill(net, tuple(prompt.inputs))
    with counters.countable(net), sparsevlm.build(method, budget=budget, **options)(net, prompt.visual_mask):
        found = flops.split(counters.torch_gmacs(prefill, tuple(prompt.inputs.values())), net)
    counted = count(model, method, budget, options)
    assert found == pytest.approx({part: counted[part] for part in found}, rel=1e-9)


def test_totals_contain_the_methods_work(model):
    parts = count(model, "divprune", 12, {})
    assert flops.prefill_gmacs(parts) == parts["llm_prefill"] + parts["method"]
    assert flops.first_token_gmacs(parts) == pytest.approx(sum(parts.values()) - parts["decode"])
    assert parts["method"] > 0


def test_counting_leaves_no_watcher_behind(model):
    from sparsevlm.runtime import parts

    with pytest.raises(ValueError, match="layers"):
        count(model, "sparsevlm", None, {"layers": (99,), "keep": (3,)})
    assert parts._watcher is None
    with parts.watch(lambda name: None), pytest.raises(RuntimeError, match="already"):
        counters.torch_gmacs(torch.nn.Identity(), (torch.empty(1, device="meta"),))


def test_variants_of_the_released_code_are_counted(model):
    """They can be traced without values, and leave the language model as many tokens as any method of that budget."""
    code = count(model, "ficoco_v", 18, {"start": 1, "variant": "code"})
    assert code["method"] > 0 and code["llm_prefill"] == count(model, "fastervlm", 18, {})["llm_prefill"]
