"""Command lines and damaged files that were told badly or not at all, and a few random ones."""

from __future__ import annotations

import random

import pytest

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

from tests.fuzz import damage, runs
from tests.fuzz.runs import Ended, check, draw, wrong

LINES = {
    "method=aim method.prune=none": "prune takes true or false, not 'none'",
    "method=aim method.first=[null]": "first takes an integer or null, not [None]",
    "method=aim method.temperature=0x10": "temperature takes a number, not '0x10'",
    "method=ficoco_l method.gamma=none": "gamma takes a number, not 'none'",
    "method=cdpruner": "needs the text tower of the CLIP model",
    "method=random model.device=2": "model.device takes a name, not 2",
    "method=random model.device=abc": "unknown device 'abc'. Use auto, cpu",
    "method=random model.pretrained={}": "model.pretrained takes a name, not {}",
    "method=random model.name=../..": "model.name='../..' cannot be part of a folder's name",
    "method=random results_dir=null": "results_dir=None is no folder",
    "method=random ~batch_size": "the configuration lacks batch_size",
    "method=random ~task": "the configuration lacks task",
    "method.name=[1]": "method has no name",
}
CHECKPOINTS = {
    "weights not numbers": "weights that are infinite or no numbers",
    "weight of another shape": "weights of other shapes than its config.json says",
    "no object": "config.json is damaged (it holds no keys)",
    "tokenizer of nothing": "tokenizer or image processor of copy are damaged",
}


@pytest.fixture(autouse=True)
def questions(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPARSEVLM_CACHE", str(tmp_path_factory.getbasetemp() / "questions"))


@pytest.mark.parametrize("line", LINES)
def test_told_clearly(line):
    words = ["budget=16", "limit=1", *line.split()]
    fault, ended = check(words)
    assert fault is None and ended.status == 2
    assert LINES[line] in ended.err


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoints_are_named(name, monkeypatch):
    kept = []
    monkeypatch.setattr(damage, "command", lambda words: kept.append(runs.command(words)) or kept[-1])
    monkeypatch.setattr(damage, "CHECKPOINTS", {name: damage.CHECKPOINTS[name]})
    assert damage.checkpoints(random.Random(0)) == f"{name}: refused"
    assert kept[0].status == 2 and CHECKPOINTS[name] in kept[0].err


@pytest.mark.parametrize("number", (2, 12))
def test_a_damaged_finished_run_is_named(number):
    assert damage.folders(random.Random(number)).endswith("refused")


def test_what_the_fuzzer_calls_wrong(tmp_path):
    """It can fail: each of these endings is one that a command must not have."""
    endings = {
        Ended(0, "", ""): "succeeded with 0 runs",
        Ended(2, "", ""): "told 0 errors",
        Ended(2, "", "error: a\nerror: b\n"): "told 2 errors",
        Ended(1, "", "error: KeyError: 'limit'\n"): "named an exception",
        Ended(1, "", "Traceback (most recent call last):\n"): "showed a traceback",
        Ended(2, "", "usage: run\nerror: a\n"): "said more than one line",
        Ended(7, "", "error: a\n"): "ended with status 7",
        Ended(None, "", "", "KeyError: 'limit'"): "raised",
    }
    for ended, told in endings.items():
        assert told in wrong(["limit=1"], ended, tmp_path)
    (tmp_path / "results/runs/half").mkdir(parents=True)
    assert "left a wrong run" in wrong(["limit=1"], Ended(2, "", "error: a\n"), tmp_path)


def test_a_few_random_ones():
    assert [(n, fault) for n in range(3) if (fault := check(draw(n, 3))[0])] == []
    assert damage.ledgers(random.Random(1)).endswith("complete")
    assert damage.disk(random.Random(2))


@pytest.mark.slow
def test_many_random_ones():
    assert runs.main(["--cases", "150", "--seed", "10"]) == 0
    assert damage.main(["--cases", "60", "--seed", "10"]) == 0
