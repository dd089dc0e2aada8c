"""Runs of models whose visual tokens depend on the picture: shares, limits of pixels, what is recorded and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

import sparsevlm  # noqa: F401  # isort: skip  - before transformers

import transformers

from eval.run import main
from tests import hub_families

CLASSES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "llava_next": "LlavaNext", "internvl": "InternVL"}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)


def run(name: str, *arguments: str) -> int:
    if not Path(name).is_dir():
        hub_families.save(name, Path(name))
    return main([f"model.pretrained=./{name}", f"model.name={name}", "limit=4", "batch_size=2", *arguments])


def results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(Path("results/runs").glob("*/metrics.json"))]


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_with_a_share(name, capsys):
    assert run(name, "method=sparsevlm", "budget=0.25") == 0, capsys.readouterr().err
    (made,) = results()
    assert made["budget"] == 0.25 and made["n"] == 4 and made["excluded"] == 0
    assert "__sparsevlm__0.25__" in os.listdir("results/runs")[0]
    samples = [json.loads(line) for line in next(Path("results/runs").glob("*/samples.jsonl")).open()]
    for sample in samples:
        assert sample["leaving"] == pytest.approx(int(0.25 * sample["visual"] + 0.5), abs=0.5)
    assert made["tokens"]["visual"] == pytest.approx(sum(s["visual"] for s in samples) / 4)
    config = yaml.safe_load(next(Path("results/runs").glob("*/config.yaml")).read_text())
    assert config["model"]["image_aspect_ratio"] == "native"
    assert made.get("positions") == ("original" if name.startswith("qwen") else None)
    assert run(name, "method=sparsevlm", "budget=0.25") == 0 and len(results()) == 1  # the same run


def test_pixels_make_another_run_and_a_number_is_clamped():
    """9 tokens at most: a budget of 20 keeps what there is, and the run says of how many questions."""
    limits = ["model.max_pixels=7056", "model.min_pixels=784"]
    assert run("qwen2_5_vl", "method=random", "budget=20", *limits) == 0
    assert run("qwen2_5_vl", "method=random", "budget=20") == 0
    few, many = sorted(results(), key=lambda m: m["tokens"]["visual"])
    assert few["tokens"]["visual"] <= 9 < 20 < many["tokens"]["visual"]
    assert few["tokens"]["clamped"] == 4 and many["tokens"]["clamped"] == 0
    assert few["tokens"]["leaving"] == few["tokens"]["visual"] and many["tokens"]["leaving"] == 20
    assert few["config_hash"] != many["config_hash"]


def test_the_table_says_shares_limits_and_both_counts(capsys):
    from scripts.make_tables import make_tables

    limits = ["model.max_pixels=7056", "model.min_pixels=7056"]
    assert run("qwen2_vl", "method=none", *limits) == 0
    assert run("qwen2_vl", "method=random", "budget=0.34", *limits) == 0
    assert "3.0 entering, 3.0 leaving of 9.0 in a prompt" in capsys.readouterr().out
    (table,) = [p.read_text() for p in make_tables(Path("results")) if p.stem.startswith("minivqa__qwen2_vl__n4")]
    caption, *rows = table.splitlines()
    assert "of 9; budget is what was asked for" in caption and "a fixed size of 7056 pixels" in caption
    assert "A budget below 1 is a share of each prompt's tokens" in caption
    (row,) = [row for row in rows if row.startswith("| random")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["0.34", "3.0", "3.0"]


def test_right_answers_are_scored(monkeypatch):
    """A model that answers what the pictures show gets all points."""
    from eval.generate import generator

    right = {}
    original = generator.Generator._generate

    def oracle(self, batch, lane, known):
        answers = original(self, batch, lane, known)
        for request, answer in zip(batch, answers, strict=True):
            document = self.documents[request.args[4]][request.args[5]][request.args[3]]
            right[answer.doc_id] = str(document["answer"])
            object.__setattr__(answer, "text", right[answer.doc_id])
        return answers

    monkeypatch.setattr(generator.Generator, "_generate", oracle)
    assert run("qwen2_vl", "method=divprune", "budget=0.5") == 0
    (made,) = results()
    assert made["metrics"]["visual_accuracy"]["value"] == 1.0 and len(right) == 4


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["method=visionzip", "budget=0.25"], "acts in the vision tower or the projector and needs one row per patch"),
        (["task=minivqa_video", "method=none"], "videos are not prepared for a model of type 'qwen2_5_vl' here"),
        (["method=none", "model.image_aspect_ratio=pad"], "keeps the shape of pictures"),
        (["method=none", "model.prompt=vicuna_v1"], "takes prompt='hub'"),
        (["method=random", "budget=1.0"], "budget 1.0 may mean one token or all of them"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert run("qwen2_5_vl", *arguments) != 0
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not Path("results/runs").exists() or not results()


def test_pictures_are_encoded_by_each_run(monkeypatch):
    """Features are shared between runs where a picture is one row of them only."""
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    calls, original = [], cls.generate

    def generate(self, **kwargs):
        calls.append({"mm_encoder_outputs", "pixel_values"} & set(kwargs))
        return original(self, **kwargs)

    monkeypatch.setattr(cls, "generate", generate)
    assert run("qwen2_5_vl", "method=none") == 0
    assert calls == [{"pixel_values"}] * 2
