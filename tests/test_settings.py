"""Settings as they are written on a command line: every spelling works with every command."""

from __future__ import annotations

import pytest
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

import sparsevlm
from eval.generate import lmms_model
from eval.measure import latency
from scripts import draw_kept
from sparsevlm.methods import build
from sparsevlm.settings import parse_options, parse_setting, parse_value

LISTS = ["(2,6,12)", "[2,6,12]", "2/6/12", "(2, 6, 12)"]
SHAPE = ["--shape", "llama-64x16", "--prompt", "4+64+8", "--device", "cpu"]


class Built(Exception):
    """What a command made of a method's options."""


def by_latency_of_a_shape(layers: str, monkeypatch, tmp_path):
    def stop(results, plans, *rest, **how):
        name, budget, options = plans[0].settings[0]
        raise Built(sparsevlm.build(name, budget=budget, **options))

    monkeypatch.setattr(latency, "time_shapes", stop)
    setting = f"sparsevlm::layers={layers}:keep=30/20/10"
    return built(lambda: latency.main([setting, *SHAPE, "--results", str(tmp_path)]))


def by_latency(layers: str, monkeypatch, tmp_path):
    def stop(results, model, pretrained, settings, *rest, **how):
        name, budget, options = settings[0]
        raise Built(sparsevlm.build(name, budget=budget, **options))

    monkeypatch.setattr(latency, "time_settings", stop)
    setting = f"sparsevlm::layers={layers}:keep=30/20/10"
    return built(lambda: latency.main([setting, "--text-tokens", "9", "--results", str(tmp_path)]))


def by_draw_kept(layers: str, monkeypatch, tmp_path):
    watch_build(monkeypatch, draw_kept.sparsevlm)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    options = ["--option", f"layers={layers}", "--option", "keep=30/20/10", "--budget", "null"]
    return built(lambda: draw_kept.main([str(tmp_path / "picture.png"), "?", *options]))


def by_lmms_eval(layers: str, monkeypatch, tmp_path):
    watch_build(monkeypatch, lmms_model.sparsevlm)
    given = {"layers": layers, "keep": "30/20/10"}
    if "," not in layers:  # at which lmms-eval's own command line splits
        given = simple_parse_args_string(f"layers={layers},keep=30/20/10")
    return built(lambda: lmms_model.SparseVLMAdapter(method="sparsevlm", budget=None, **given))


def watch_build(monkeypatch, module) -> None:
    original = sparsevlm.build

    def watched(*arguments, **options):
        raise Built(original(*arguments, **options))

    monkeypatch.setattr(module, "build", watched)


def built(start):
    with pytest.raises(Built) as found:
        start()
    return found.value.args[0]


@pytest.mark.parametrize("layers", LISTS)
@pytest.mark.parametrize(
    "entry", [by_latency_of_a_shape, by_latency, by_draw_kept, by_lmms_eval], ids=lambda f: f.__name__
)
def test_every_spelling_at_every_entry(entry, layers, monkeypatch, tmp_path):
    method = entry(layers, monkeypatch, tmp_path)
    assert method == build("sparsevlm", budget=None, layers=(2, 6, 12), keep=(30, 20, 10))
    assert method.layers == (2, 6, 12) and method.keep == (30, 20, 10)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64), ("0.5", 0.5), ("1e-3", 0.001), ("true", True), ("True", True), ("false", False), ("False", False),
        ("null", None), ("None", None), ("none", "none"), ("all", "all"), ('"all"', "all"), ("full", "full"),
        ("(2,)", (2,)), ("[2]", (2,)), ("[0.5, 0.25]", (0.5, 0.25)), ("2/", "2/"), ("", ""), (7, 7),
    ],
)  # fmt: skip
def test_values(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_settings():
    assert parse_setting("none:full") == ("none", "full", {})
    assert parse_setting("sparsevlm_rank") == parse_setting("sparsevlm_rank:") == ("sparsevlm_rank", None, {})
    assert parse_setting("sparsevlm::keep=(9, 4):raters=all:early_drop=False") == (
        "sparsevlm", None, {"keep": (9, 4), "raters": "all", "early_drop": False},
    )  # fmt: skip


@pytest.mark.parametrize("texts", [["raters"], ["=all"], ["raters=all", "raters=paper"]])
def test_options_that_are_none(texts):
    with pytest.raises(ValueError, match="is not name=value|given twice"):
        parse_options(texts)
    with pytest.raises(ValueError, match="is not method:budget"):
        parse_setting(":".join(["sparsevlm", "64", *texts]))
