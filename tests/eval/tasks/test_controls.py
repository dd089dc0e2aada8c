"""Controls: the oracle, saliency and questions without pictures, alone and through `eval.run`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sparsevlm
from eval.run import main
from eval.runs.reader import read_runs
from eval.tasks.controls import Oracle, Saliency
from eval.tasks.minivqa.dataset import rows
from scripts.tables.separation_report import Outcome, read, write

QUESTIONS = 9


@pytest.fixture(scope="module")
def drawn():
    return list(rows(0, QUESTIONS))


@pytest.fixture(scope="module")
def batch(mini, drawn):
    """(questions whose answer has a place, inputs of the model)."""
    placed = [row for row in drawn if row["target_patches"]][:3]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in placed]
    return placed, mini[1](text=[row["question"] for row in placed], images=pictures)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study as experiment=separation runs it."""
    results = tmp_path_factory.mktemp("separation")
    common = [f"limit={QUESTIONS}", f"results_dir={results}"]
    assert main(["-m", "task=minivqa,minivqa_blind", "method=none", *common]) == 0
    assert main(["-m", "method=oracle,saliency,sparsevlm", "budget=64,16", *common]) == 0
    return results


def test_controls_are_methods_that_are_not_listed():
    assert (
        type(sparsevlm.build("oracle", budget=16)) is Oracle
        and type(sparsevlm.build("saliency", budget=16)) is Saliency
    )
    assert not {"oracle", "saliency"} & set(sparsevlm.methods())
    with pytest.raises(ValueError, match="no option 'sead'. Its options: "):
        sparsevlm.build("oracle", budget=16, sead=1)
    with pytest.raises(ValueError, match="has a method 'random'"):
        sparsevlm.methods.register(type("Other", (Oracle,), {"name": "random"}))


def test_the_oracle_keeps_exactly_its_targets_and_random_others(mini, batch):
    model, (placed, inputs) = mini[0], batch
    method = Oracle(budget=16, targets=[row["target_patches"] for row in placed])
    with torch.no_grad(), method(model) as trace:
        model(**inputs)
    for origin, row in zip(trace.prefills[0].stages[0].origin, placed, strict=True):
        assert len(origin) == 16
        assert set(row["target_patches"]) <= set(origin.tolist()) or len(row["target_patches"]) > 16
    with pytest.raises(ValueError, match="set `targets`"), torch.no_grad(), Oracle(budget=16)(model):
        model(**inputs)


def test_saliency_ranks_by_what_visual_tokens_pay_to_one_another(mini, batch):
    """Against the layer's own attention map, and whatever the question."""
    model, (_, inputs), layer = mini[0], batch, 1
    with torch.no_grad(), Saliency(layers=(layer,), keep=(64,))(model) as trace:
        model(**inputs)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attention = model(**inputs, output_attentions=True).attentions[layer].mean(1)
    finally:
        model.set_attn_implementation("sdpa")
    stage = trace.prefills[0].stages[0]
    for scores, attended, visual in zip(stage.scores, attention, inputs["input_ids"] == 3, strict=True):
        np.testing.assert_allclose(scores, attended[visual][:, visual].sum(0), rtol=1e-3, atol=1e-5)


def test_runs_note_what_was_kept_of_the_answers_place(study, drawn):
    by_name = {(run.task, run.metrics["method"], run.metrics["budget"]): run for run in read_runs(study)}
    placed = {row["question_id"] for row in drawn if row["target_patches"]}
    oracle = by_name["minivqa", "oracle", 64].samples
    assert {s["doc_id"] for s in oracle if "target_kept" in s} == placed and 0 < len(placed) < QUESTIONS
    assert all(s["target_kept"] == 1.0 for s in oracle if "target_kept" in s)
    assert not any("target_kept" in s or "raters" in s for s in by_name["minivqa", "none", "full"].samples)
    kept = by_name["minivqa", "sparsevlm", 16]
    assert all(s["raters"] and 0 <= s.get("target_kept", 0) <= 1 for s in kept.samples)
    asked = {word for row in drawn for word in row["question"].split()}
    assert {word for s in kept.samples for word in s["raters"]} <= asked | {":"}


def test_what_is_noted_is_what_the_trace_says(mini, study, drawn):
    model, processor = mini
    run = next(r for r in read_runs(study) if (r.metrics["method"], r.metrics["budget"]) == ("sparsevlm", 16))
    for sample, row in zip(run.samples, drawn, strict=True):
        inputs = processor(text=row["question"], images=Image.open(io.BytesIO(row["image"]["bytes"])))
        with torch.no_grad(), sparsevlm.build("sparsevlm", budget=16)(model) as trace:
            model(**inputs)
        record = trace.prefills[0]
        words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0, record.raters[0]].tolist())
        assert sample["raters"] == words
        if row["target_patches"]:
            shared = set(row["target_patches"]) & set(record.stages[0].origin[0].tolist())
            assert sample["target_kept"] == len(shared) / len(row["target_patches"])


def test_blind_questions_are_the_same_without_pictures(study):
    runs = {run.task: run for run in read_runs(study) if run.metrics["method"] == "none"}
    blind, seeing = runs["minivqa_blind"], runs["minivqa"]
    assert [(s["question"], s["target"]) for s in blind.samples] == [
        (s["question"], s["target"]) for s in seeing.samples
    ]
    assert {s["visual"] for s in blind.samples} == {0} and {s["visual"] for s in seeing.samples} == {576}
    assert [s["input_tokens"] + 576 for s in blind.samples] == [s["input_tokens"] for s in seeing.samples]
    assert blind.metrics["cost"]["note"] == "questions without pictures"
    assert seeing.metrics["metrics"]["accuracy"]["value"] > blind.metrics["metrics"]["accuracy"]["value"]


def test_the_report_is_that_of_the_runs(study):
    write(study)
    by_key = {(o.label, o.budget): o for o in read(study)}
    assert {label for label, _ in by_key} == {"none", "blind", "oracle", "saliency", "sparsevlm"}
    oracle = by_key["oracle", 64]
    key = ("oracle", 64)
    (run,) = [r for r in read_runs(study) if (r.metrics["method"], r.metrics["budget"]) == key]
    right = [s["scores"]["accuracy"] for s in run.samples if s["question_type"] != "next"]
    assert oracle.accuracy() == pytest.approx(100 * np.mean(right)) and oracle.kept == 1.0
    text = (study / "separation.md").read_text()
    assert f"| {oracle.accuracy():.1f} [" in text and "**blind**" in text and "becomes a rater" in text


def test_runs_and_files_that_do_not_belong_together_are_refused(tmp_path):
    content = {"model": "m", "weights": "1", "task": "t", "seed": 0, "questions": 1, "setting": {"method": "none"}}
    content["results"] = [{"id": 0, "type": "count", "right": True}]
    files = {"a": content, "b": content | {"weights": "2"}}
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="Keep them apart"):
        read(tmp_path)
    (tmp_path / "b.json").write_text(json.dumps(content | {"results": []}))
    with pytest.raises(ValueError, match="holds 0 of 1 questions"):
        read(tmp_path)
    with pytest.raises(ValueError, match="experiment=separation"):
        read(Path(tmp_path, "nowhere"))


def test_kept_share_is_a_mean_over_the_questions_that_have_one():
    results = [{"id": 0, "type": "a", "right": True, "kept": 0.5}, {"id": 1, "type": "b", "right": False}]
    outcome = Outcome("x", 64, {"results": results})
    assert outcome.kept == 0.5 and outcome.accuracy() == 50 and outcome.accuracy("a") == 100
