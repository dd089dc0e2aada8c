"""What runs need is listed without a hub, fetched by the same code that a run uses, and missed in one line each."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

from eval import fetch
from eval.tasks import TASKS
from eval.tasks.requests import load_questions
from tests import hub_layout


@pytest.fixture(autouse=True)
def fresh(hub, monkeypatch):
    fetch._size.cache_clear()
    monkeypatch.delenv("SPARSEVLM_JUDGE", raising=False)
    load_questions.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return hub_layout.save_llava_7b(tmp_path_factory.mktemp("checkpoint"), layers=3)


def errors(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


def test_an_experiment_is_listed_and_nothing_is_fetched(capfd, monkeypatch):
    monkeypatch.setattr(fetch, "find_checkpoint", lambda *_: pytest.fail("fetched"))
    assert fetch.main(["experiment=paper_image", "limit=5", "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "model llava_1_5_7b: llava-hf/llava-1.5-7b-hf, size unknown (HF_HUB_OFFLINE=1)"
    table = ["gqa", "mmbench", "mme", "pope", "scienceqa", "vqav2", "textvqa", "conbench", "seedbench", "mmvet"]
    assert [line.partition(":")[0] for line in lines[1:]] == [f"task {name}" for name in table]
    assert "task gqa: lmms-lab-encoder/GQA, " in lines[1]


def test_sweeps_and_videos_are_listed(capfd):
    assert (
        fetch.main(
            ["-m", "model=video_llava_7b", "task=msvd,nextqa,mvbench", "method=none,fastv", "budget=64", "--dry-run"]
        )
        == 0
    )
    model, msvd, nextqa, mvbench = capfd.readouterr().out.splitlines()
    assert "LanguageBind/Video-LLaVA-7B-hf" in model
    assert "NOT on the hub" in msvd and "MSVD_Zero_Shot_QA" in msvd
    assert "videos go to " in nextqa and mvbench.count("OpenGVLab/MVBench") == 1


def test_every_task_has_a_source(capfd):
    assert fetch.main([f"task={','.join(TASKS)}", "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "model mini: ships with this package" and len(lines) == 1 + len(TASKS)


def test_sizes_are_the_hubs(capfd, monkeypatch):
    def repo_info(self, repository, repo_type, revision, files_metadata, timeout):
        if repo_type == "dataset":
            raise ConnectionError("no route")
        files = {"model.safetensors": 13e9, "tokenizer.json": 1e9, "pytorch_model.bin": 99e9}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files.items()])

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    assert fetch.main(["model=llava_1_5_7b", "task=pope", "--dry-run"]) == 0
    model, task = capfd.readouterr().out.splitlines()
    assert model.endswith("llava-hf/llava-1.5-7b-hf, 14.0 GB") and task.endswith("POPE, size unknown (ConnectionError)")


def test_what_is_fetched_is_what_a_run_takes(checkpoint, capfd, monkeypatch):
    arguments = ["model=llava_1_5_7b", f"model.pretrained={checkpoint}", "task=pope,mmvet"]
    assert fetch.main(arguments) == 0
    assert "everything is there" in capfd.readouterr().out


def test_what_is_missing_costs_nothing_else(own_hub, capfd):
    shutil.rmtree(own_hub / "datasets" / "lmms-lab-encoder___gqa")
    assert fetch.main(["model=llava_1_5_7b", "task=gqa,pope"]) == 2
    model, gqa = errors(capfd)
    assert "model llava_1_5_7b: llava-hf/llava-1.5-7b-hf (llava-1.5-7b) is neither a local folder" in model
    assert "task gqa: cannot load the task gqa" in gqa


@pytest.mark.parametrize(
    ("arguments", "message"), [(["task=gq"], "unknown task 'gq'"), (["limt=3"], "unknown config key 'limt'")]
)
def test_wrong_arguments(arguments, message, capfd):
    assert fetch.main(arguments) == 2
    (line,) = errors(capfd)
    assert message in line
