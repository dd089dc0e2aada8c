"""Every command that a document shows is one that works: parsed and composed here, and, where slow, run in small."""

import argparse
import importlib
import re
import subprocess
import sys

import pytest
import tomllib

import sparsevlm
from eval import run as command_line
from eval.runs import settings
from eval.tasks import TASKS
from sparsevlm.models.checkpoint import HUB_ALIASES
from tests.commands import ROOT, Command, commands

#: Commands that are executed by another test, literally.
ELSEWHERE = {
    "python -m eval.run method=loudest budget=128 limit=16": "tests/methods/test_contributing.py",
    "python -m lmms_eval": "tests/eval/test_processes.py",
    "python -m eval.tasks": "tests/methods/test_contributing.py",
}
LAUNCHERS = ("joblib", "slurm", "submitit_local")
COMMANDS = commands()
RUNS = [c for c in COMMANDS if c.after("-m", "eval.run") is not None and c.text not in ELSEWHERE]
DIFFERENT_RUNS = list({tuple(c.after("-m", "eval.run")): c for c in RUNS}.values())
SWEEPS = [c for c in COMMANDS if c.text.startswith("make sweep")]


def name(command: Command) -> str:
    return f"{command.where}: {command.text}"


class Parsed(Exception):
    """The arguments were understood."""


@pytest.fixture
def parsing(monkeypatch):
    """argparse says that it has understood, instead of going on."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **options):
        original(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    from tests import hub_families, hub_layout

    folder = tmp_path_factory.mktemp("checkpoints")
    image = hub_layout.save_llava_7b(folder / "image")
    made = {alias: image for alias in HUB_ALIASES if alias.startswith("llava-1.5")}
    made["video-llava-7b"] = hub_layout.save_video_llava(folder / "video")
    for alias in HUB_ALIASES.keys() - made.keys():
        name = alias.rpartition("-")[0].replace("internvl3", "internvl").replace("-", "_").replace(".", "_")
        made[alias] = hub_families.save(name, folder / name)
    return made


@pytest.fixture
def composed(checkpoints, monkeypatch, tmp_path):
    """Arguments of eval.run -> the runs that it would do; of each entry of an experiment the first one. The hub's
    checkpoints are stood in for by tiny ones in the same layout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEVLM_JUDGE", "some-model")
    original, listed, seen = settings.find_checkpoint, command_line._listed, []
    monkeypatch.setattr(settings, "find_checkpoint", lambda n, r=None: checkpoints.get(n) or original(n, r))
    monkeypatch.setattr(command_line, "run_series", lambda runs, command: seen.extend(runs) or 0)
    monkeypatch.setattr(command_line, "time_runs", lambda runs, **options: 0)
    monkeypatch.setattr(
        command_line, "_listed",
        lambda entries: listed([{k: v[0] if isinstance(v, list) else v for k, v in e.items()} for e in entries]),
    )  # fmt: skip

    def compose(arguments: list[str]):
        for argument in arguments:
            if argument.startswith("hydra/launcher="):
                assert argument.partition("=")[2] in LAUNCHERS
        kept = [a for a in arguments if not a.startswith("hydra") and a != "experiment="]
        assert command_line.main(kept) == 0
        return seen

    return compose


def test_commands_are_found():
    assert len(RUNS) > 60 and len(SWEEPS) >= 3
    assert {c.where for c in COMMANDS} >= {"README.md", "CONTRIBUTING.md", "eval/run.py", "configs/config.yaml"}
    found = {c.text for c in COMMANDS}
    assert "python -m eval.run experiment=paper_image model=llava_1_5_13b limit=1000" in found
    assert any(text.endswith("pretrained=mini,method=sparsevlm,budget=192 --tasks minivqa") for text in found)


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_each_is_covered(command):
    """A new kind of command needs a test below."""
    kinds = (
        command in RUNS,
        command.words[0] == "make",
        command.text.startswith("pip install"),
        command.after("-m", "eval") is not None,
        command.after("-m", "eval.fetch") is not None,
        command.text in ELSEWHERE,
        module_of(command) is not None,
    )
    assert any(kinds), f"no test knows what to do with {command.text!r} of {command.where}"
    if command.text in ELSEWHERE:
        assert (ROOT / ELSEWHERE[command.text]).is_file()


@pytest.mark.parametrize("command", DIFFERENT_RUNS, ids=name)
def test_runs_can_be_composed(command, composed):
    assert composed(command.after("-m", "eval.run"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=name)
def test_make_knows_its_targets(command, composed):
    done = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        inner = Command("Makefile", line).after("-m", "eval.run") if "-m eval.run" in line else None
        if inner is not None:
            assert composed([a for a in inner if not a.startswith("args=")])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.after("-m", "eval.fetch") is not None], ids=name)
def test_what_is_to_be_fetched_can_be_listed(command, monkeypatch, capsys):
    from eval import fetch

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch.main([*command.after("-m", "eval.fetch"), "--dry-run"]) == 0
    assert "model llava_1_5_7b: llava-hf/llava-1.5-7b-hf" in capsys.readouterr().out


def module_of(command: Command) -> tuple[str, list[str]] | None:
    """(module, arguments) of a script of ours other than eval.run and eval."""
    words = command.words
    for i, word in enumerate(words):
        if word.startswith("scripts/"):
            return word.removesuffix(".py").replace("/", "."), words[i + 1 :]
        if (
            word == "-m"
            and words[i + 1] != "eval.fetch"
            and "eval.run" not in words
            and words[i + 1] not in ("eval", "eval.tasks", "lmms_eval")
        ):
            return words[i + 1], words[i + 2 :]
    return None


@pytest.mark.parametrize("command", [c for c in COMMANDS if module_of(c)], ids=name)
def test_scripts_understand_their_arguments(command, parsing, monkeypatch):
    where, arguments = module_of(command)
    path = ROOT / where.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    if not arguments:
        return
    monkeypatch.setattr(sys, "argv", [where, *arguments])
    with pytest.raises(Parsed):
        importlib.import_module(where).main(arguments)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.after("-m", "eval") is not None], ids=name)
def test_lmms_evals_command_line_understands_its_arguments(command, monkeypatch):
    from lmms_eval.__main__ import parse_eval_args
    from lmms_eval.utils import simple_parse_args_string

    monkeypatch.setattr(sys, "argv", ["eval", *command.after("-m", "eval")])
    _, args = parse_eval_args()
    assert args.model == "sparsevlm" and all(task in TASKS for task in args.tasks.split(","))
    options = simple_parse_args_string(args.model_args)
    assert sparsevlm.build(options["method"], budget=options["budget"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith("pip install")], ids=name)
def test_extras_that_are_to_be_installed_exist(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, extra in re.findall(r"([\w.-]*)\[(\w+)\]", command.text):
        assert extra in project["optional-dependencies"] and package in (".", project["name"])


def on_mini(command: Command) -> bool:
    return not re.search(
        r"llava|experiment=(paper|methods|reproduce|separation)|task=(?!minivqa)|hydra|\.\.\.", command.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in DIFFERENT_RUNS if "accelerate" not in c.text and on_mini(c)], ids=name)
def test_runs_of_the_embedded_model_work(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "time_runs", lambda runs, **options: 0)
    arguments = [a for a in command.after("-m", "eval.run") if not a.startswith(("limit=", "results_dir="))]
    assert command_line.main([*arguments, "limit=2"]) == 0
    assert any((tmp_path / "results" / "runs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.after("-m", "eval") is not None], ids=name)
def test_lmms_evals_command_line_works(command, tmp_path, monkeypatch):
    from eval.__main__ import main

    monkeypatch.chdir(tmp_path)
    given = [a for a in command.after("-m", "eval")]
    monkeypatch.setattr(sys, "argv", ["eval", *given, "--limit", "2", "--output_path", str(tmp_path / "out")])
    assert main() == 0
