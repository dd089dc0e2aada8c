"""The separation report: its controls, its files, its table."""

import json

import numpy as np
import pytest
import torch

import sparsevlm
from eval import separation
from eval.separation import Setting, answer, batches, settings
from eval.separation_report import Outcome, read, write
from eval.tasks.controls import Oracle, Saliency

QUESTIONS = 9


@pytest.fixture(scope="module")
def mini():
    return sparsevlm.load("mini")


@pytest.fixture(scope="module")
def data(mini):
    return list(batches(mini[1], 0, QUESTIONS, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("separation")
    command = [
        "--questions",
        str(QUESTIONS),
        "--methods",
        "oracle,pyramiddrop",
        "--budgets",
        "64,16",
        "--out",
        str(folder),
    ]
    assert separation.main(command) == 0
    return folder, command


def test_every_method_and_control_is_there_at_every_budget():
    found = settings(None, (64, 16))
    assert {s.method for s in found} == {*sparsevlm.methods(), "oracle", "saliency", "blind"} - {
        "anchorprune",
        "cdpruner",
    }
    assert len({(s.label, s.budget) for s in found}) == len(found)
    assert all((s.budget is None) == (s.method in ("none", "blind")) for s in found)
    with pytest.raises(ValueError, match="unknown method 'abacus'"):
        settings(["abacus"], (64,))


def test_batches_hold_each_question_once_and_one_type_each(data):
    assert sorted(row["question_id"] for batch in data for row in batch.rows) == list(range(QUESTIONS))
    assert all(len({row["question_type"] for row in batch.rows}) == 1 for batch in data)
    for batch in data:
        assert (batch.inputs["input_ids"] == 3).sum() == 576 * len(batch.rows)
        assert not (batch.blind["input_ids"] == 3).any() and "pixel_values" not in batch.blind


def test_the_oracle_keeps_exactly_its_targets_and_random_others(mini, data):
    model, processor = mini
    batch = next(batch for batch in data if all(row["target_patches"] for row in batch.rows))
    method = Oracle(budget=16, targets=[row["target_patches"] for row in batch.rows])
    with torch.no_grad(), method(model) as trace:
        model(**batch.inputs)
    for origin, row in zip(trace.prefills[0].stages[0].origin, batch.rows, strict=True):
        assert len(origin) == 16
        assert set(row["target_patches"]) <= set(origin.tolist()) or len(row["target_patches"]) > 16
    results = answer(model, processor, Setting("oracle", 64), batch)
    assert [r["kept"] for r in results] == [1.0] * len(batch.rows)
    with pytest.raises(ValueError, match="set `targets`"), torch.no_grad(), Oracle(budget=16)(model):
        model(**batch.inputs)


def test_saliency_ranks_by_what_visual_tokens_pay_to_one_another(mini, data):
    """Against the layer's own attention map, and whatever the question."""
    model, _ = mini
    layer, batch = 1, data[0]
    with torch.no_grad(), Saliency(layers=(layer,), keep=(64,))(model) as trace:
        model(**batch.inputs)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attention = model(**batch.inputs, output_attentions=True).attentions[layer].mean(1)
    finally:
        model.set_attn_implementation("sdpa")
    visual = batch.inputs["input_ids"][0] == 3
    for scores, rows in zip(trace.prefills[0].stages[0].scores, attention, strict=True):
        np.testing.assert_allclose(scores, rows[visual][:, visual].sum(0), rtol=1e-3, atol=1e-5)


def test_every_setting_is_a_file_and_none_is_run_twice(folder, monkeypatch):
    folder, command = folder
    files = sorted(path.name for path in folder.glob("*.json"))
    assert [name.rsplit("-", 1)[0] for name in files] == [
        "blind-full", "none-full", "oracle-16", "oracle-64", "pyramiddrop-16", "pyramiddrop-64",
    ]  # fmt: skip
    monkeypatch.setattr(separation, "answer", None)
    assert separation.main(command) == 0
    assert sorted(path.name for path in folder.glob("*.json")) == files


def test_the_table_is_that_of_the_files_and_names_what_was_refused(folder):
    folder, _ = folder
    text = (folder / "separation.md").read_text()
    by_key = {(o.label, o.budget): o for o in read(folder)}
    oracle = by_key["oracle", 64]
    right = sum(r["right"] for r in json.loads(next(folder.glob("oracle-64-*")).read_text())["results"])
    assert oracle.accuracy() == pytest.approx(100 * right / QUESTIONS)
    assert f"| {oracle.accuracy():.1f} [" in text
    refused = [o for o in by_key.values() if "refused" in o.content]
    assert {o.label for o in refused} <= {"pyramiddrop"}
    assert all(o.content["refused"] in text for o in refused)


def test_files_that_do_not_belong_together_or_are_cut_are_refused(folder, tmp_path):
    source, _ = folder
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    victim = next(tmp_path.glob("oracle-64-*"))
    content = json.loads(victim.read_text())
    victim.write_text(json.dumps(content | {"weights": "0" * 16}))
    with pytest.raises(ValueError, match="keep them apart"):
        write(tmp_path)
    victim.write_text(json.dumps(content | {"results": content["results"][:-1]}))
    with pytest.raises(ValueError, match=f"holds {QUESTIONS - 1} of {QUESTIONS} questions"):
        write(tmp_path)
    with pytest.raises(ValueError, match="no results"):
        write(tmp_path / "nowhere")


def test_kept_share_is_a_mean_over_the_questions_that_have_one():
    results = [{"id": 0, "type": "a", "right": True, "kept": 0.5}, {"id": 1, "type": "b", "right": False}]
    outcome = Outcome("x", 64, {"results": results})
    assert outcome.kept == 0.5 and outcome.accuracy() == 50 and outcome.accuracy("a") == 100
