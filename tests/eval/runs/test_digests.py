"""What is really asked is part of a run's identity: a changed sentence, pixel or stop rule makes another run."""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from eval.generate import generator as asking
from eval.run import main
from eval.runs import digests as module
from sparsevlm.models import Processor
from tests.eval.runs.test_settings import settle
from tests.eval.test_run import breaking

FAST = ["method=random", "budget=16", "limit=4", "batch_size=2"]
render, pixels, arguments = Processor.render, Processor._pixels, asking.generation_arguments


def politer(self, *question) -> str:
    """Another sentence in the conversation."""
    return render(self, *question) + " please"


def brighter(self, pictures):
    return pixels(self, pictures) + 0.1


def longer(kwargs, max_new_tokens):
    return {**arguments(kwargs, max_new_tokens)[0], "min_new_tokens": 2}, ["stop"]


CHANGES = {
    "prompt": (Processor, "render", politer),
    "pixels": (Processor, "_pixels", brighter),
    "stop rule": (asking, "generation_arguments", longer),
    "lmms-eval": (metadata, "version", lambda name, version=metadata.version: version(name) + ".1"),
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("what", CHANGES)
def test_is_part_of_the_identity(what, monkeypatch):
    before = settle(*FAST)
    one, answers = before.run_id(), before.answers_hash()
    place, name, changed = CHANGES[what]
    monkeypatch.setattr(place, name, changed)
    after = settle(*FAST)
    assert after.run_id() != one and after.answers_hash() != answers
    monkeypatch.undo()
    assert settle(*FAST).run_id() == one


def test_a_finished_run_of_another_text_is_another_run(monkeypatch, capfd):
    assert main(FAST) == 0
    (first,) = os.listdir("results/runs")
    content = (Path("results/runs", first) / "samples.jsonl").read_bytes()
    monkeypatch.setattr(Processor, "render", politer)
    asked = breaking(monkeypatch, 0)
    assert main(FAST) == 0
    assert asked == [2, 2] and "already there" not in capfd.readouterr().out
    assert len(os.listdir("results/runs")) == 2
    assert (Path("results/runs", first) / "samples.jsonl").read_bytes() == content
    digests = [json.loads((p / "metrics.json").read_text())["asked"] for p in Path("results/runs").iterdir()]
    assert digests[0]["processing"] != digests[1]["processing"] and digests[0]["requests"] == digests[1]["requests"]


def test_a_half_finished_run_of_another_text_is_not_gone_on_with(monkeypatch):
    with monkeypatch.context() as patch:
        breaking(patch, 2, KeyboardInterrupt())
        assert main(FAST) == 130
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "render", politer)
        asked = breaking(patch, 0)
        assert main(FAST) == 0
    assert asked == [2, 2]  # all four, not the two that were missing
    asked = breaking(monkeypatch, 0)
    assert main(FAST) == 0
    assert asked == [2]  # the first text again: the half that there was counts


def test_generated_questions_are_known_by_their_first_ones():
    assert settle("limit=18").run_id() != settle("limit=19").run_id()
    assert module.asked(settle("limit=18")) == module.asked(settle("limit=400")) == module.asked(settle())
