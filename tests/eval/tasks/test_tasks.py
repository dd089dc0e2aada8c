"""The registry of tasks: each can be chosen on the command line, and its options are checked."""

import csv
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from eval.errors import UserError
from eval.runs.configs import CONFIGS
from eval.tasks import SCALES, TASKS, task_settings
from eval.tasks.generated import Generated
from eval.tasks.loading import order

BENCHMARKS = [name for name, task in TASKS.items() if not isinstance(task, Generated)]


@pytest.fixture(autouse=True)
def no_judge(monkeypatch):
    for name in ("SPARSEVLM_JUDGE", "SPARSEVLM_JUDGE_URL"):
        monkeypatch.delenv(name, raising=False)


def composed(name: str, *overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", [f"task={name}", *overrides]), resolve=True)["task"]


def test_every_task_is_declared_in_python_alone():
    assert not (CONFIGS / "task").exists()
    for name, task in TASKS.items():
        assert set(composed(name)) == {"name", *task.options} and task.title


@pytest.mark.parametrize("name", BENCHMARKS)
def test_configs_are_settings_of_their_task(name):
    judged = ["task.judge=some-model"] if TASKS[name].judge else []
    config = composed(name, *judged)
    settings = task_settings(config)
    assert settings.name == name and settings.plain() == config
    assert TASKS[name].metrics[TASKS[name].headline(settings)] in SCALES
    assert task_settings({"name": name, **{k: config[k] for k in ("judge",) if k in config}}) == settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"metric": "exact_match"}, "unknown config key 'task.metric'."),
        ({"ocr": "maybe"}, "task.ocr=maybe is unknown; known: True, False"),
        ({"ocrr": True}, "unknown config key 'task.ocrr'. Did you mean 'task.ocr'?"),
        ({"name": "textvqaa"}, "unknown task 'textvqaa'. Did you mean 'textvqa'?"),
    ],
)
def test_wrong_values(overrides, message):
    with pytest.raises(UserError) as error:
        task_settings({**composed("textvqa"), **overrides})
    assert message in str(error.value)


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if TASKS[n].judge])
def test_the_judge_comes_from_the_environment_and_names_the_headline(name, monkeypatch):
    for judge in (None, "exact_match"):
        if judge:
            monkeypatch.setenv("SPARSEVLM_JUDGE", judge)
        settings = task_settings(composed(name))
        assert settings.options["judge"] == judge
        assert TASKS[name].headline(settings) == "exact_match"  # never under the judge's name
    monkeypatch.setenv("SPARSEVLM_JUDGE", "some-model")
    assert TASKS[name].headline(task_settings(composed(name))) == next(iter(TASKS[name].metrics)) != "exact_match"


def test_what_changes_the_numbers_is_in_the_identity():
    def identity(*overrides, limit=None):
        settings = task_settings(composed("tgif", "task.judge=a", *overrides))
        return TASKS["tgif"].identity(settings, limit)

    base = identity()
    assert base == identity("task.judge_timeout=5")
    assert all(base != identity(o) for o in ("task.judge=b", "task.judge_url=http://x/v1", "task.data=/x"))
    assert base != identity(limit=5)


class TestOrder:
    def test_groups_stay_whole_under_any_limit_and_a_smaller_limit_is_a_beginning(self):
        keys = list("abcabcab")
        assert order(keys, None, False) == [0, 3, 6, 1, 4, 7, 2, 5]
        for limit in range(1, 9):
            rows = order(keys, limit, False)
            assert rows == order(keys, None, False)[: len(rows)]
            assert len(rows) == {1: 3, 2: 3, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6, 8: 8}[limit]

    def test_splits_take_turns(self):
        keys = list("aaabbbccc")
        assert order(keys, None, True) == [0, 3, 6, 1, 4, 7, 2, 5, 8]
        assert [keys[i] for i in order(keys, 7, True)] == list("abcabc")


@pytest.mark.parametrize("name", ["paper_image", "paper_video"])
def test_the_papers_experiments_hold_every_cell_of_their_tables(name):
    runs = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())["experiment"]["runs"]
    asked = {
        (task, method, str(budget))
        for run in runs
        for task in run["task"]
        for method in ([run["method"]] if isinstance(run["method"], str) else run["method"])
        for budget in run.get("budget", ["full"])
    }
    model, tables = {
        "paper_image": ("llava_1_5_7b", {"Table 1"}),
        "paper_video": ("video_llava_7b", {"Table 2", "Table 3"}),
    }[name]
    with open(Path(CONFIGS.parent, "eval", "published.csv"), newline="") as file:
        published = {
            (r["benchmark"], r["method"], "full" if r["method"] == "none" else r["tokens"])
            for r in csv.DictReader(file)
            if r["paper"] == "SparseVLM" and r["model"] == model and r["table"] in tables and r["benchmark"] in TASKS
        }
    assert published and published <= asked


def test_the_command_lines_model_wins_over_the_experiments():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", ["experiment=paper_image", "model=llava_1_5_13b"])
    assert (config.model.pretrained, config.model.prompt, config.model.image_aspect_ratio) == (
        "llava-1.5-13b", "vicuna_v1", "pad",
    )  # fmt: skip
