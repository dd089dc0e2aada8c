"""Counted multiply-adds against the paper, a closed formula and torch's own counter."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch

import sparsevlm
from sparsevlm.cost import counters, flops
from sparsevlm.cost.floor import floor
from sparsevlm.cost.flops import count, formula_gmacs
from sparsevlm.cost.shapes import load_config, make_prompt
from sparsevlm.mini import weights_dir

HEAD_7B = 4096 * 32064 / 1e9


@cache
def mini(method: str = "none", budget=None, text_tokens: int = 12, **options) -> dict[str, float]:
    """A count of the embedded model, once for all tests."""
    return count("mini", method, budget or "full", text_tokens, **options)


def clip_gmacs(tokens: int, hidden: int = 1024, intermediate: int = 4096, layers: int = 24) -> float:
    """The vision tower by hand: patch embedding of 14 x 14 x 3, then plain transformer layers with a two-layer MLP."""
    patches = (tokens - 1) * 14 * 14 * 3 * hidden
    layer = 4 * tokens * hidden**2 + 2 * tokens**2 * hidden + 2 * tokens * hidden * intermediate
    return (patches + layers * layer) / 1e9


def decode_gmacs(lengths: list[int], d: int, m: int, vocabulary: int) -> float:
    """One token that attends to the cache of each layer and itself, and the output head, by hand."""
    return (sum(4 * d * d + 2 * (n + 1) * d + 3 * d * m for n in lengths) + d * vocabulary) / 1e9


def test_the_unpruned_7b_is_the_papers():
    parts = count("llava-1.5-7b", text_tokens=118)
    assert parts["llm_prefill"] / 1000 == pytest.approx(4.62, abs=0.005)  # "TFLOPs" of table 1: multiply-adds
    assert parts["llm_prefill"] == pytest.approx(formula_gmacs([694] * 32, 4096, 11008) + HEAD_7B, rel=1e-9)
    assert parts["vision"] == pytest.approx(clip_gmacs(577), rel=1e-9)  # all 24 layers, though the last is never read
    assert parts["projector"] == pytest.approx(576 * (1024 * 4096 + 4096 * 4096) / 1e9, rel=1e-9)
    assert parts["decode"] == pytest.approx(decode_gmacs([694] * 32, 4096, 11008, 32064), rel=1e-6)


def test_a_video_is_eight_frames_with_their_class_tokens():
    parts = count("video-llava-7b", text_tokens=44)
    assert parts["vision"] == pytest.approx(8 * clip_gmacs(257), rel=1e-9)
    assert parts["llm_prefill"] == pytest.approx(formula_gmacs([2100] * 32, 4096, 11008) + HEAD_7B, rel=1e-9)


def test_13b_shapes():
    text = load_config("llava-1.5-13b").text_config
    found = text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size
    assert found == (5120, 40, 13824, 32064)


@pytest.mark.slow
def test_13b_is_counted_by_its_shapes():
    parts = count("llava-1.5-13b", text_tokens=60)
    head = 5120 * 32064 / 1e9
    assert parts["llm_prefill"] == pytest.approx(formula_gmacs([636] * 40, 5120, 13824) + head, rel=1e-9)


@pytest.mark.parametrize(
    ("budget", "paper", "total"),
    [
        (192, 2.14, 2.135),
        pytest.param(128, 1.72, 1.732, marks=pytest.mark.slow),
        pytest.param(64, 1.30, 1.315, marks=pytest.mark.slow),
    ],
)
def test_pruned_7b_against_the_formula_and_the_paper(budget, paper, total):
    """`total`: what this repository printed while the method's work was counted with the language model's."""
    counted = flops.run("llava-1.5-7b", "sparsevlm", budget, 118, early_drop=False)
    parts, formula = counted.gmacs, formula_gmacs(counted.lengths, 4096, 11008)
    assert formula / 1000 == pytest.approx(paper, abs=0.02)
    assert parts["llm_prefill"] == pytest.approx(formula + HEAD_7B, rel=1e-9)
    assert 0 < parts["method"] < 0.005 * formula  # raters' scores, clustering, merging
    assert flops.prefill_gmacs(parts) / 1000 == pytest.approx(total, abs=0.0005)
    assert parts["decode"] == pytest.approx(decode_gmacs(counted.lengths, 4096, 11008, 32064), rel=1e-6)


def test_early_drop_computes_less_and_random_nothing_extra():
    plain = mini("sparsevlm", 64, early_drop=False)
    early = mini("sparsevlm", 64)
    assert early["llm_prefill"] < 0.98 * plain["llm_prefill"] and early["method"] == plain["method"] > 0
    assert early["decode"] == pytest.approx(plain["decode"], rel=1e-6)
    random = mini("random", 64)
    assert random["llm_prefill"] == pytest.approx(formula_gmacs([76] * 12, 192, 512) + 192 * 64 / 1e9, rel=1e-3)
    assert random["method"] == 0


@pytest.mark.parametrize(
    ("model", "method", "budget", "options"),
    [
        ("mini", "sparsevlm", 100, {}),
        ("llama-64x4", "none", "full", {}),
        ("llama-64x4", "random", 100, {}),
        ("llama-64x4", "sparsevlm", 100, {}),
        ("llama-64x4", "sparsevlm", 100, {"early_drop": False}),
        ("llama-64x4", "sparsevlm_plus", 100, {}),
        pytest.param("video-llava-7b", "sparsevlm", 194, {}, marks=pytest.mark.slow),
    ],
)
def test_torchs_counter_agrees_part_by_part(model, method, budget, options):
    parts = count(model, method, budget, 20, **options)
    net = counters.meta_model(model)
    prompt = make_prompt(net.config, 20, device="meta", dtype=net.dtype)
    prefill = counters.Prefill(net, tuple(prompt.inputs))
    with counters.countable(net), sparsevlm.build(method, budget=budget, **options)(net, prompt.visual_mask):
        found = flops.split(counters.torch_gmacs(prefill, tuple(prompt.inputs.values())), net)
        step = torch.empty(1, 1, dtype=torch.long, device="meta")
        found["decode"] = counters.torch_gmacs(counters.Decode(net, prefill.cache), (step,))[""]
    assert found == pytest.approx(parts, rel=1e-9)


def test_a_broadcast_product_counts_every_entry():
    class Product(torch.nn.Module):
        def forward(self, a, b):
            return a @ b

    a, b = torch.empty(1, 1, 1, 5, device="meta"), torch.empty(2, 3, 5, 7, device="meta")
    assert counters.fvcore_gmacs(Product(), (a, b))[""] * 1e9 == pytest.approx(2 * 3 * 5 * 7)


def test_torchs_counter_is_for_meta_tensors():
    with pytest.raises(ValueError, match="meta"):
        counters.torch_gmacs(torch.nn.Linear(2, 2), (torch.ones(1, 2),))


def test_text_models_are_counted():
    parts = count("llama-128x4x2", text_tokens=60)
    assert parts["llm_prefill"] == pytest.approx(formula_gmacs([636] * 4, 128, 344) + 128 * 1000 / 1e9, rel=1e-9)
    assert parts["vision"] == parts["projector"] == 0


@pytest.mark.parametrize("name", ["llama-", "llama-64", "llama-64x0", "llama-65x2x2", "llama-6x2x2", "llama-axb"])
def test_impossible_text_models_are_refused(name):
    with pytest.raises(ValueError, match="shape"):
        load_config(name)


def test_a_known_rank_makes_rank_forms_countable():
    """Video branch: keep the rank after layer 1; 30 % of the rest become 10 % of that many."""
    model = "llama-64x8"
    counted = flops.run(model, "sparsevlm_rank", None, 44, rank=11, rule="video", layers=(1,))
    assert [n - 44 for n in counted.lengths] == [576] * 2 + [11 + 18] * 6
    fixed = flops.run(model, "sparsevlm", None, 44, layers=(1,), keep=(11,))
    assert counted.gmacs == pytest.approx(fixed.gmacs, rel=1e-9)
    v10 = flops.run(model, "sparsevlm_rank", None, 44, rank=12, rule="v1.0", scale=13.5, bias=0, layers=(2, 6))
    assert [n - 44 for n in v10.lengths] == [576] * 3 + [162 + 13] * 4 + [162 + 1]
    with pytest.raises(ValueError, match="rank=3 is for sparsevlm_rank"):
        count("mini", "sparsevlm", 64, rank=3)
    with pytest.raises(ValueError, match="rank=0"):
        count("mini", "sparsevlm_rank", None, rank=0)


@pytest.mark.parametrize("model", [pytest.param("llava-1.5-7b", marks=pytest.mark.slow), "mini"])
def test_the_floor_is_the_formula_of_its_lengths(model):
    """The floor computes the layers on the shortened rows and nothing else: fvcore counts what the formula says."""
    counted = flops.run(model, "sparsevlm", 128, 60, early_drop=False)
    net, text = counters.meta_model(model), load_config(model).text_config
    prompt = make_prompt(net.config, 60, device="meta", dtype=net.dtype)
    prefill = counters.Prefill(net, tuple(prompt.inputs))
    with counters.countable(net), floor(net, dict(enumerate(counted.lengths))):
        by_module = counters.fvcore_gmacs(prefill, tuple(prompt.inputs.values()))
    head = text.hidden_size * text.vocab_size / 1e9
    formula = formula_gmacs(counted.lengths, text.hidden_size, text.intermediate_size)
    assert flops.split(by_module, net)["llm_prefill"] == pytest.approx(formula + head, rel=1e-9)
    assert [layer.keys.shape[2] for layer in prefill.cache.layers] == counted.lengths
    assert counted.gmacs["llm_prefill"] == pytest.approx(formula + head, rel=1e-9)
    assert 0 < counted.gmacs["method"] / (formula + head) < 0.02


def test_clustering_counts_its_distances():
    pool, merged = 100, 11  # int(0.3 * 332) + 1 of 332 dropped tokens, int(0.1 * 100) + 1
    options = {"layers": (1,), "early_drop": False}
    with_recycling = flops.run("mini", "sparsevlm", None, 20, **options, keep=(244,))
    without = flops.run("mini", "sparsevlm", None, 20, **options, keep=(244 + merged,), recycle=0)
    assert with_recycling.lengths == without.lengths
    extra = with_recycling.gmacs["method"] - without.gmacs["method"]
    assert with_recycling.gmacs["llm_prefill"] == pytest.approx(without.gmacs["llm_prefill"], rel=1e-9)
    assert extra == pytest.approx((pool * pool + merged * pool) * 192 / 1e9, rel=1e-6)


def test_no_product_is_overlooked(monkeypatch):
    """Whatever fvcore has no rule for must not be a matrix product."""
    from fvcore.nn import FlopCountAnalysis

    seen = []
    original = FlopCountAnalysis.by_module_and_operator
    monkeypatch.setattr(FlopCountAnalysis, "by_module_and_operator", lambda self: seen.append(self) or original(self))
    count("mini", "sparsevlm", 64, text_tokens=20)
    unknown = {name.removeprefix("aten::") for analysis in seen for name in analysis.unsupported_ops()}
    assert len(seen) == 2 and "mul" in unknown
    products = {"mm", "mv", "dot", "bmm", "baddbmm", "addmv", "outer", "einsum", "matmul", "linear", "cdist"}
    assert not [name for name in unknown if name in products or "attention" in name or "conv" in name]


def test_a_folder_is_a_model_and_counting_leaves_nothing_behind(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_DISABLE_TORCH_CHECK", raising=False)
    first = count(str(weights_dir("mini")), "sparsevlm", 64, text_tokens=12)
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK" not in os.environ
    assert count("mini", text_tokens=12) != first  # with hooks left in it, it would be pruned
    assert count("mini", "sparsevlm", 64, text_tokens=12) == first


def test_what_cannot_be_counted_is_said():
    with pytest.raises(ValueError, match="llava-1.5-7b, llava-1.5-13b, video-llava-7b"):
        count("llava-2")
    with pytest.raises(ValueError, match="Known methods"):
        count("mini", "sparsvlm")
    with pytest.raises(ValueError, match="text_tokens=2"):
        count("mini", text_tokens=2)
    with pytest.raises(ValueError, match="as the picture asks for"):
        count("mini", "sparsevlm_rank", None, lam=0.5)
    with pytest.raises(ValueError, match="no option 'ratrs'"):
        count("mini", "sparsevlm", 64, ratrs="all")


def test_other_model_types_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llava, video_llava"):
        load_config(str(tmp_path))


def test_prompt_layout():
    config = load_config("llava-1.5-7b")
    prompt = make_prompt(config, 118, batch_size=2, device="meta")
    assert prompt.visual_mask.sum(1).tolist() == [576, 576] and prompt.visual_mask.shape == (2, 694)
    assert prompt.visual_mask[0].tolist().index(True) == 35
    real = make_prompt(load_config("mini"), 12, seed=3)
    is_image = real.inputs["input_ids"] == load_config("mini").image_token_index
    assert is_image.equal(real.visual_mask)  # and no other word is the placeholder
    assert make_prompt(load_config("mini"), 12, seed=3).inputs["input_ids"].equal(real.inputs["input_ids"])


def test_fvcore_is_imported_only_to_count():
    code = "import sys, sparsevlm.cost.flops, sparsevlm.cost.latency; sys.exit('fvcore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
