"""What only a process of its own shows: starting from another directory, exit statuses, signals."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

from eval.generate.lmms_model import SparseVLMAdapter
from eval.run import CONFIGS
from eval.tasks import FOLDER, TASKS
from eval.tasks.generated import Generated
from tests.eval.requests import make_documents, make_requests

RUN = [sys.executable, "-m", "eval.run"]


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}


def test_from_another_directory(tmp_path):
    command = [*RUN, "method=sparsevlm", "budget=0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: budget 0 is below 1; it counts the mean visual tokens per layer. Use at least 1, or 'full'\n"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_started_again(tmp_path, how):
    command = [*RUN, "method=none", "limit=40", "batch_size=2"]
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (kept := sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("results/runs/.*.partial/ledger.jsonl"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(how)
    _, err = started.communicate(timeout=60)
    assert started.returncode == (130 if how == signal.SIGTERM else -how)
    if how == signal.SIGTERM:
        assert "the same command goes on from there" in err and "Traceback" not in err
    (partial,) = (tmp_path / "results/runs").iterdir()
    assert partial.name.startswith(".") and set(os.listdir(partial)) == {"ledger.jsonl", "started.jsonl"}
    before = (partial / "ledger.jsonl").read_bytes()

    again = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    (folder,) = (tmp_path / "results/runs").iterdir()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["doc_id"] for s in samples] == list(range(40))
    first = [json.loads(line) for line in before.splitlines()]
    seconds = {s["doc_id"]: s["seconds"] for s in samples}
    assert len(first) >= kept and all(seconds[a["doc_id"]] == a["seconds"] for a in first)  # not asked again


def own_task(folder: Path, n: int = 6) -> Path:
    """minivqa under another name, on few questions: what lmms-eval's command line can be given."""
    from eval.tasks import FOLDER
    from eval.tasks.minivqa.dataset import FILE_NAME, build_dataset

    data = build_dataset(1, n, folder / "data") / FILE_NAME
    folder.joinpath("few.yaml").write_text(
        f"include: {FOLDER / 'minivqa' / 'minivqa.yaml'}\ntask: few\ndataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
    )
    return folder


def test_lmms_evals_command_line(tmp_path, monkeypatch, capfd):
    from eval.__main__ import main

    arguments = "pretrained=mini,method=sparsevlm,budget=192,raters=all,batch_size=3"
    monkeypatch.setattr(
        sys, "argv",
        ["lmms-eval", "--model", "sparsevlm", "--model_args", arguments, "--tasks", "few", "--device", "cpu",
         "--include_path", str(own_task(tmp_path)), "--output_path", str(tmp_path / "out"), "--log_samples"],
    )  # fmt: skip
    assert main() == 0
    (results,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text())["results"]["few"]
    assert 0 <= found["accuracy,none"] <= 1
    (samples,) = (tmp_path / "out").rglob("*_samples_few.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 6
    assert lines[0]["token_counts"][0]["input_tokens"] > 576
    assert sum(line["accuracy"] for line in lines) / 6 == pytest.approx(found["accuracy,none"])


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, Generated)])
def test_lmms_evals_command_line_makes_this_versions_questions(name, tmp_path, monkeypatch):
    """Where the YAML looks for them, whatever an older version left there."""
    from lmms_eval.utils import load_yaml_config

    from eval import __main__ as command

    made, home = {}, FOLDER / TASKS[name].folder.removeprefix("own:")
    monkeypatch.setitem(
        TASKS, name, dataclasses.replace(TASKS[name], build=lambda seed, n, folder: made.update(at=(seed, n, folder)))
    )
    command.make_questions(name)
    seed, n, folder = made["at"]
    expected = folder / f"v{TASKS[name].version}-seed{seed}-n{n}" / "test.parquet"
    path = str(load_yaml_config(str(home / f"{name}.yaml"), mode="simple")["dataset_kwargs"]["data_files"]["test"])
    assert Path(home, path) == expected
    command.make_questions("gqa")  # nothing to make


@pytest.mark.slow
def test_lmms_evals_command_line_fails_loudly(tmp_path, monkeypatch):
    from eval.__main__ import main
    from eval.generate.generator import GenerationError, Generator

    def fails(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(Generator, "_generate", fails)
    monkeypatch.setattr(
        sys, "argv",
        ["lmms-eval", "--model", "sparsevlm", "--model_args", "pretrained=mini", "--tasks", "few", "--limit", "2",
         "--include_path", str(own_task(tmp_path))],
    )  # fmt: skip
    with pytest.raises(GenerationError, match="task few, document"):
        main()


PLAIN = "import sparsevlm, runpy; runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_lmms_evals_own_command_finds_the_plugin(tmp_path, processes):
    """`python -m lmms_eval`, by the entry point alone; two processes share by lmms-eval's own rule.

    sparsevlm is imported first because lmms-eval cannot start beside a CPU-only torch and PyPI's torchvision.
    """
    tmp_path.joinpath("plain.py").write_text(PLAIN)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = "pretrained=mini,method=random,budget=64,batch_size=2"
    command = [sys.executable, *(launch if processes > 1 else []), "plain.py", "--model", "sparsevlm", "--model_args"]
    command += [arguments, "--tasks", "few", "--include_path", str(own_task(tmp_path, 5)), "--output_path", "out"]
    command += ["--log_samples"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_few.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(line["doc_id"] for line in lines) == list(range(5))
    found = json.loads(results.read_text())["results"]["few"]["accuracy,none"]
    assert found == pytest.approx(sum(line["accuracy"] for line in lines) / 5)
    answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
    adapter = SparseVLMAdapter("mini", "random", 64)
    documents = make_documents(5, seed=1)
    adapter.task_dict["minivqa"] = {"test": documents}
    expected = [r.text for r in adapter.generate_until(make_requests(documents))]
    assert [answers[i] for i in range(5)] == expected


def test_the_plugin_points_at_the_adapter():
    from importlib import import_module

    from eval.plugin import manifests

    (manifest,) = manifests()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "sparsevlm" and getattr(import_module(module), name) is SparseVLMAdapter
