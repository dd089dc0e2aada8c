"""Counted multiply-adds against the paper, a closed formula and torch's own counter."""

import os
import subprocess
import sys

import pytest
from torch.utils.flop_counter import FlopCounterMode

import sparsevlm
from sparsevlm.cost import flops
from sparsevlm.cost.flops import count, formula_gmacs, lengths_entering
from sparsevlm.cost.shapes import load_config, make_prompt
from sparsevlm.mini import weights_dir

HEAD_7B = 4096 * 32064 / 1e9


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
    parts = count("llava-1.5-13b", text_tokens=60)
    head = 5120 * 32064 / 1e9
    assert parts["llm_prefill"] == pytest.approx(formula_gmacs([636] * 40, 5120, 13824) + head, rel=1e-9)


@pytest.mark.parametrize(("budget", "paper"), [(192, 2.14), (128, 1.72), (64, 1.30)])
def test_pruned_7b_against_the_formula_and_the_paper(budget, paper):
    parts, prefill = flops._run("llava-1.5-7b", "sparsevlm", budget, 118, {"early_drop": False})
    formula = formula_gmacs(lengths_entering(prefill), 4096, 11008)
    assert formula / 1000 == pytest.approx(paper, abs=0.02)
    overhead = parts["llm_prefill"] - HEAD_7B - formula  # raters' queries and scores, clustering, merging
    assert 0 < overhead < 0.005 * formula
    assert parts["decode"] == pytest.approx(decode_gmacs(lengths_entering(prefill), 4096, 11008, 32064), rel=1e-6)


def test_early_drop_computes_less_and_random_nothing_extra():
    plain = count("mini", "sparsevlm", 64, text_tokens=12, early_drop=False)
    early = count("mini", "sparsevlm", 64, text_tokens=12, early_drop=True)
    assert early["llm_prefill"] < 0.98 * plain["llm_prefill"]
    assert early["decode"] == pytest.approx(plain["decode"], rel=1e-6)
    random = count("mini", "random", 64, text_tokens=12)["llm_prefill"]
    assert random == pytest.approx(formula_gmacs([76] * 12, 192, 512) + 192 * 64 / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "budget", "options"),
    [("none", "full", {}), ("random", 100, {}), ("sparsevlm", 100, {}), ("sparsevlm_plus", 100, {})],
)
def test_torchs_counter_agrees(method, budget, options):
    """torch counts two per multiply-add."""
    parts, _ = flops._run("mini", method, budget, 20, options)
    net = flops._meta_model("mini")
    prompt = make_prompt(net.config, 20, device="meta", dtype=net.dtype)
    prefill = flops._Prefill(net)
    with flops._countable(net), sparsevlm.build(method, budget=budget, **options)(net, prompt.visual_mask):
        with FlopCounterMode(display=False) as counter:
            prefill(*prompt.inputs.values())
    total = parts["llm_prefill"] + parts["vision"] + parts["projector"]
    assert counter.get_total_flops() / 1e9 == pytest.approx(2 * total, rel=1e-9)


def test_clustering_counts_its_distances():
    pool, merged = 100, 11  # int(0.3 * 332) + 1 of 332 dropped tokens, int(0.1 * 100) + 1
    options = {"layers": (1,), "early_drop": False}
    with_recycling = flops._run("mini", "sparsevlm", None, 20, {**options, "keep": (244,)})
    without = flops._run("mini", "sparsevlm", None, 20, {**options, "keep": (244 + merged,), "recycle": 0})
    assert lengths_entering(with_recycling[1]) == lengths_entering(without[1])
    extra = with_recycling[0]["llm_prefill"] - without[0]["llm_prefill"]
    assert extra == pytest.approx((pool * pool + merged * pool) * 192 / 1e9, rel=1e-6)


def test_no_product_is_overlooked(monkeypatch):
    """Whatever fvcore has no rule for must not be a matrix product."""
    from fvcore.nn import FlopCountAnalysis

    seen = []
    original = FlopCountAnalysis.by_module
    monkeypatch.setattr(FlopCountAnalysis, "by_module", lambda self: seen.append(self) or original(self))
    count("mini", "sparsevlm", 64, text_tokens=20)
    unknown = {name.removeprefix("aten::") for analysis in seen for name in analysis.unsupported_ops()}
    assert len(seen) == 2 and "mul" in unknown
    products = {"mm", "mv", "dot", "bmm", "baddbmm", "addmv", "outer", "einsum", "matmul", "linear", "cdist"}
    assert not [name for name in unknown if name in products or "attention" in name or "conv" in name]


def test_a_folder_is_a_model_and_counting_leaves_nothing_behind(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_DISABLE_TORCH_CHECK", raising=False)
    first = count("mini", "sparsevlm", 64, text_tokens=12)
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK" not in os.environ
    assert count("mini", text_tokens=12) != first
    assert count(str(weights_dir("mini")), "sparsevlm", 64, text_tokens=12) == first
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


def test_the_command_prints_a_table(capsys):
    flops.main(["--model", "mini", "--method", "none", "sparsevlm", "--budget", "64", "--text-tokens", "12"])
    out = capsys.readouterr().out
    prefill = count("mini", "sparsevlm", 64, text_tokens=12)["llm_prefill"]
    assert "12 non-visual tokens" in out
    assert f"| mini | sparsevlm | 64 | 111.1 | 64.0 | {prefill:,.2f} | {2 * prefill:,.2f} |" in out
    assert "| mini | none | full | 576.0 | 576.0 |" in out
    with pytest.raises(SystemExit) as stop:
        flops.main(["--model", "mini", "--budget", "10000"])
    assert stop.value.code == 2 and "10000" in capsys.readouterr().err


def test_fvcore_is_imported_only_to_count():
    code = "import sys, sparsevlm.cost.flops, sparsevlm.cost.latency; sys.exit('fvcore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
