"""The papers' commands, from the command line to the run folder, on tiny checkpoints laid out as the hub's."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

from eval import run as command_line
from eval import tasks as tasks_module
from eval.run import main
from eval.runs import evaluate
from eval.runs.reader import read_runs
from eval.tasks import TASKS
from eval.tasks import judge as judging
from eval.tasks.requests import load_questions
from scripts.make_tables import build_tables
from tests import hub_layout
from tests.eval.tasks import hub_cache, judge_server
from tests.eval.tasks.judge_server import VERSION


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava_1_5_7b": hub_layout.save_llava_7b(folder / "image", layers=3),
        "video_llava_7b": hub_layout.save_video_llava(folder / "video"),
    }


@pytest.fixture(autouse=True)
def workplace(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("SPARSEVLM_JUDGE", "SPARSEVLM_JUDGE_URL", "SPARSEVLM_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    load_questions.cache_clear()
    judging._judge.cache_clear()  # it remembers replies


@pytest.fixture
def run(checkpoints):
    def run(task: str, *arguments: str, model: str = "llava_1_5_7b") -> int:
        common = [f"model={model}", f"model.pretrained={checkpoints[model]}", "max_new_tokens=2", "model.dtype=float32"]
        return main([f"task={task}", *common, *arguments])

    return run


def metrics() -> dict:
    (folder,) = [f for f in Path("results/runs").iterdir() if not f.name.startswith(".")]
    return json.loads((folder / "metrics.json").read_text())


def one_line(capfd) -> str:
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


VIDEO = {"model": "video_llava_7b"}


class TestWholeRuns:
    def test_a_benchmark_of_pictures_says_what_it_is(self, run):
        assert run("pope", "method=sparsevlm", "budget=64", "experiment=llava_1_5_7b_paper", "limit=4") == 0
        found = metrics()
        assert found["task"] == "pope" and found["n"] == 3 and found["tokens"]["visual"] == 576
        assert next(iter(found["metrics"])) == found["benchmark"]["metric"] == "pope_f1_mean"
        assert found["benchmark"]["scale"] == "percent" and found["benchmark"]["computed_by"] == "this project"
        assert found["benchmark"]["data"][0]["path"] == "lmms-lab-encoder/POPE" and found["benchmark"]["judge"] is None

    def test_a_test_split_leaves_the_file_for_its_server(self, run):
        assert run("vqav2_testdev", "method=sparsevlm", "budget=64", "experiment=llava_1_5_7b_paper") == 0
        assert metrics()["metrics"] == {"answered": {"value": 3.0, "ci95": None, "n": 3}}
        (file,) = Path("results/runs").glob("vqav2_testdev__*/submission.json")
        assert [row["question_id"] for row in json.loads(file.read_text())] == [20, 21, 22]

    def test_questions_without_a_picture(self, run):
        assert run("scienceqa_full", "method=sparsevlm", "budget=64", "experiment=llava_1_5_7b_paper") == 0
        (file,) = Path("results/runs").glob("scienceqa_full__*/samples.jsonl")
        visual = [json.loads(line)["visual"] for line in file.read_text().splitlines()]
        assert sorted(visual) == [0, 576]

    @pytest.mark.slow
    def test_several_tasks_of_lmms_eval_in_one_run(self, run):
        assert run("mvbench", "limit=20", **VIDEO) == 0
        found = metrics()
        assert found["n"] == 20 and found["metrics"]["mvbench_mean"]["value"] <= 100
        assert (
            len(found["benchmark"]["lmms_tasks"])
            == 20
            == sum(name.startswith("mvbench_") for name in found["metrics"]) - 1
        )

    def test_videos_and_a_judge(self, run, judge):
        options = ["task.judge=stand-in", f"task.judge_url={judge.url}", "task.judge_timeout=5"]
        assert run("msvd", "method=sparsevlm", "budget=194", "experiment=video_llava_7b_paper", *options, **VIDEO) == 0
        found = metrics()
        assert found["tokens"]["visual"] == 8 * 257 and found["tokens"]["leaving"] == pytest.approx(194, abs=0.5)
        assert found["benchmark"]["judge"] == {"model": "stand-in", "url": judge.url, "versions": [VERSION]}
        assert next(iter(found["metrics"])) == "gpt_accuracy" and found["metrics"]["gpt_accuracy"]["value"] == 0
        (folder,) = Path("results/runs").iterdir()
        replies = [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]
        assert len(replies) == 2 and "'pred': 'no'" in replies[0]["reply"]

    @pytest.mark.slow
    def test_without_a_judge_the_score_has_another_name(self, run):
        assert run("tgif", "task.judge=exact_match", **VIDEO) == 0
        found = metrics()
        assert list(found["metrics"]) == ["exact_match"] and found["benchmark"]["metric"] == "exact_match"
        assert (
            found["benchmark"]["judge"]["model"] == "exact_match"
            and "no published number" in found["benchmark"]["judge"]["note"]
        )


class TestJudges:
    """A judge that is missing, dies or talks nonsense costs its own metrics; the others and the answers are there."""

    def options(self, judge) -> list[str]:
        return ["task.judge=stand-in", f"task.judge_url={judge.url}", "task.judge_timeout=5", "limit=2"]

    def unjudged(self, reason: str) -> None:
        found = metrics()
        assert list(found["metrics"]) == ["exact_match"] and found["n"] == 2
        assert list(found["not_scored"]) == ["gpt_eval_score"] and reason in found["not_scored"]["gpt_eval_score"]

    def judged_later(self, run, judge, monkeypatch) -> None:
        """The same command with a judge that works scores the kept answers; no model is even loaded."""
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "_load", lambda *_: pytest.fail("the model was loaded"))
            assert run("mmvet", *self.options(judge)) == 0
        found = metrics()  # and there is one folder only
        assert next(iter(found["metrics"])) == "gpt_eval_score" and "not_scored" not in found
        assert found["benchmark"]["judge"]["versions"] == [VERSION]

    def test_none_named(self, run, judge, capfd, monkeypatch):
        assert run("mmvet", "limit=2") == 4
        out, err = capfd.readouterr()
        assert "gpt_eval_score NOT JUDGED: no language model was named" in out and "error: " not in err
        self.unjudged("no language model was named to judge: task.judge=<model>")
        assert run("mmvet", "limit=2") == 4 and "already there" in capfd.readouterr().out
        assert run("mmvet", "limit=2", "task.judge=exact_match") == 0
        self.judged_later(run, judge, monkeypatch)
        assert run("mmvet", "limit=2") == 0  # what is there has more than what is asked for
        assert "already there" in (out := capfd.readouterr().out) and "NOT JUDGED" not in out.splitlines()[-1]

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1"])
    def test_one_that_cannot_be_reached(self, run, judge, capfd, monkeypatch, url):
        assert run("mmvet", "task.judge=x", f"task.judge_url={url}", "limit=2") == 4
        assert f"warning: the judge x at {url} does not answer (APIConnectionError" in capfd.readouterr().err
        self.unjudged("does not answer")

    def test_one_that_hangs(self, run, judge, capfd, monkeypatch):
        monkeypatch.setattr(judging, "CHECK_SECONDS", 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(judge, "reply", None)
            assert run("mmvet", *self.options(judge)) == 4
        assert "does not answer (APITimeoutError" in capfd.readouterr().err
        self.unjudged("APITimeoutError")
        self.judged_later(run, judge, monkeypatch)

    def test_one_that_talks_nonsense(self, run, judge, capfd, monkeypatch):
        nonsense = lambda messages: "yes" if len(messages[0]["content"]) < 50 else "who knows"  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(judge, "reply", nonsense)
            assert run("mmvet", *self.options(judge)) == 4
            assert run("mmvet", *self.options(judge)) == 4  # asked again: still nonsense
        self.unjudged("replied 'who knows', which is no score, about 'What is x?'")
        self.judged_later(run, judge, monkeypatch)

    def test_one_that_dies_halfway(self, run, judge, monkeypatch):
        """What it said before is kept and not asked again."""
        monkeypatch.setattr("eval.tasks.loading.JUDGED_AT_ONCE", 1)
        asked = []

        def reply(messages):
            if len(messages[0]["content"]) >= 50:
                asked.append(messages)
                judge.status = 400 if len(asked) > 1 else 200
            return judge_server.verdict(messages)

        with monkeypatch.context() as patch:
            patch.setattr(judge, "reply", reply)
            patch.setattr(judge, "status", 200)
            assert run("mmvet", *self.options(judge)) == 4
        self.unjudged("stopped answering (BadRequestError")
        (folder,) = Path("results/runs").iterdir()
        assert len((folder / "judge.jsonl").read_text().splitlines()) == 1
        count = len(judge.requests)
        self.judged_later(run, judge, monkeypatch)
        assert len(judge.requests) - count == 10  # whether it is there; nine of the ten judgements

    def test_another_judge_scores_the_same_answers(self, run, judge, monkeypatch):
        assert run("mmvet", *self.options(judge)) == 0
        monkeypatch.setattr(evaluate, "_load", lambda *_: pytest.fail("the model was loaded"))
        assert run("mmvet", *self.options(judge), "task.judge=another") == 0
        assert len(os.listdir("results/runs")) == 2

    @pytest.mark.parametrize("state", ["none", "nonsense", "dying"])
    def test_costs_a_sweep_one_column(self, checkpoints, judge, monkeypatch, state):
        """Two tasks, two methods: all else has its numbers, every table is made, and a working judge fills the gap."""
        pretrained = f"model.pretrained={checkpoints['llava_1_5_7b']}"
        sweep = [
            "-m",
            "model=llava_1_5_7b",
            "model.name=tiny",
            pretrained,
            "model.dtype=float32",
            "max_new_tokens=2",
            "limit=3",
        ]
        sweep += ["task=mmvet,pope", "method=none,random", "budget=64"]
        asked = []

        def reply(messages):
            asked.extend([0] * (len(messages[0]["content"]) >= 50))
            if state == "dying" and len(asked) > 1:
                judge.status = 503
            return "who knows" if state == "nonsense" and asked else judge_server.verdict(messages)

        with monkeypatch.context() as patch:
            patch.setattr(judge, "reply", reply)
            patch.setattr(judge, "status", 200)
            if state != "none":
                patch.setenv("SPARSEVLM_JUDGE", "stand-in")
                patch.setenv("SPARSEVLM_JUDGE_URL", judge.url)
            assert main(sweep) == 4
        runs = {(r.task, r.metrics["method"]): r for r in read_runs(Path("results"))}
        assert len(runs) == 4 and all("pope_f1_mean" in runs["pope", m].metrics["metrics"] for m in ("none", "random"))
        for method in ("none", "random"):
            unscored = runs["mmvet", method]
            assert list(unscored.metrics["metrics"]) == ["exact_match"] and list(unscored.not_scored) == [
                "gpt_eval_score"
            ]
        names = {table.name.split("__")[0] for table in build_tables(list(runs.values()))}
        assert {"mmvet", "pope", "table1_icml"} <= names
        monkeypatch.setenv("SPARSEVLM_JUDGE", "stand-in")
        monkeypatch.setenv("SPARSEVLM_JUDGE_URL", judge.url)
        monkeypatch.setattr(evaluate, "_load", lambda *_: pytest.fail("the model was loaded"))
        assert main(sweep) == 0
        judged = [r for r in read_runs(Path("results")) if r.task == "mmvet"]
        assert len(judged) == 2 and all(next(iter(r.metrics["metrics"])) == "gpt_eval_score" for r in judged)


class TestWhatIsAsked:
    """A run whose question would be another one now is another run."""

    @pytest.fixture
    def runs(self, run):
        def runs(**changes) -> set[str]:
            shipped = TASKS["pope"]
            before = set(os.listdir("results/runs")) if os.path.isdir("results/runs") else set()
            with pytest.MonkeyPatch.context() as patch:
                if changes:
                    changed = lambda settings: {**shipped.overrides(settings), **changes}  # noqa: E731
                    patch.setitem(tasks_module.TASKS, "pope", dataclasses.replace(shipped, overrides=changed))
                assert run("pope", "limit=3") == 0
            return set(os.listdir("results/runs")) - before

        return runs

    def test_the_tasks_text_and_stop_strings(self, runs):
        assert len(runs()) == 1 and runs() == set()
        post = {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": " Yes or no?"}}}
        assert len(runs(**post)) == 1
        assert len(runs(generation_kwargs={"max_new_tokens": 128, "do_sample": False, "until": ["."]})) == 1
        assert runs() == set()  # and the first one is still there


class TestRefusals:
    """Everything that is missing is told on one line before a model is loaded."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        monkeypatch.setattr(evaluate, "_load", lambda *_: pytest.fail("the model was loaded"))

    def test_data_that_are_not_there(self, run, own_hub, capfd):
        shutil.rmtree(own_hub / "datasets" / "lmms-lab-encoder___gqa")
        assert run("gqa") == 2
        assert (
            "cannot load the task gqa: ConnectionError: Couldn't" in (line := one_line(capfd))
            and "HF_HUB_OFFLINE" in line
        )

    def test_a_folder_of_videos_that_is_not_there(self, run, own_hub, capfd):
        shutil.rmtree(own_hub / "nextqa")
        assert run("nextqa", **VIDEO) == 2
        assert f"there is no folder {own_hub / 'nextqa'} with the videos" in one_line(capfd)

    @pytest.mark.parametrize("task", ["activitynet", "nextqa", "videomme", "mvbench"])
    def test_videos_that_are_not_there(self, run, own_hub, capfd, task):
        for path in own_hub.rglob("*.mp4"):
            if path.stem in ("v_a1", "101", "vm1", "mv1"):
                path.unlink()
        judge = ["task.judge=exact_match"] if task == "activitynet" else []
        assert run(task, *judge, **VIDEO) == 2
        of = {"activitynet": 2, "nextqa": 2, "videomme": 3, "mvbench": 2}[task]
        assert f"the videos of 1 of {of} questions of" in (line := one_line(capfd)) and "are missing" in line

    def test_videos_of_the_authors_files(self, run, own_hub, capfd):
        folder = own_hub / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA"
        (folder / "videos" / "clip1.avi").unlink()
        judge = "task.judge=exact_match"
        assert run("msvd", judge, **VIDEO) == 2
        assert f"1 videos are missing under {folder}, for example clip1" in one_line(capfd)
        (folder / "test_a.json").write_text('[{"question_id": "msvd0", "answer"')
        assert run("msvd", judge, "limit=1", **VIDEO) == 2
        assert "test_a.json is damaged" in one_line(capfd)
        assert run("msvd", judge, "task.data=/nowhere", **VIDEO) == 2
        assert "there is no folder /nowhere; set task.data" in one_line(capfd)

    def test_videos_for_a_model_of_pictures(self, run, capfd):
        assert run("msvd", "task.judge=exact_match") == 2
        assert "a model of type 'llava' takes no input of kind 'video'" in one_line(capfd)

    def test_splits_that_are_not_popes(self, own_hub, run, capfd):
        shutil.rmtree(own_hub / "datasets" / "lmms-lab-encoder___pope")
        rows = [dict(question_id="1", question="?", answer="yes", image=hub_cache.picture(0))]
        schema = dict(question_id=hub_cache.TEXT, question=hub_cache.TEXT, answer=hub_cache.TEXT, image=hub_cache.IMAGE)
        hub_cache.write_dataset(own_hub, "lmms-lab-encoder/POPE", None, {"test": rows}, schema)
        assert run("pope") == 2
        assert "cannot load the task pope" in one_line(capfd)


class TestDamagedSamples:
    """A picture or a video that is not whole is never scored as if it were."""

    def damage_picture(self, home, keep: float) -> None:
        shutil.rmtree(home / "datasets" / "lmms-lab-encoder___vq_av2")
        good = {"bytes": encoded(hub_cache.picture(0)), "path": None}
        bad = {"bytes": good["bytes"][: int(len(good["bytes"]) * keep)], "path": None}
        answers = [dict(answer="cat", answer_confidence="yes", answer_id=j) for j in range(10)]
        rows = [
            dict(question_id=70 + i, question="What?", answers=answers, image=p)
            for i, p in enumerate((good, bad, good))
        ]
        kinds = [{"answer": hub_cache.TEXT, "answer_confidence": hub_cache.TEXT, "answer_id": hub_cache.NUMBER}]
        schema = dict(question_id=hub_cache.NUMBER, question=hub_cache.TEXT, answers=kinds, image=hub_cache.IMAGE)
        hub_cache.write_dataset(home, "lmms-lab-encoder/VQAv2", None, {"validation": rows}, schema)

    @pytest.mark.parametrize("keep", [0.5, 0.01])
    def test_a_picture(self, run, own_hub, capfd, keep):
        self.damage_picture(own_hub, keep)
        assert run("vqav2", "batch_size=2") == 1
        line = one_line(capfd)
        assert "task vqav2_val, document 1" in line and "the picture or video of question_id 71 cannot be read" in line
        assert all(name.startswith(".") for name in os.listdir("results/runs"))

    def test_recorded_if_asked_for(self, run, own_hub, capfd):
        self.damage_picture(own_hub, 0.5)
        assert run("vqav2", "batch_size=2", "on_error=record") == 3
        found = metrics()
        assert (found["n"], found["excluded"]) == (2, 1)

    def test_a_video(self, run, own_hub, capfd):
        path = own_hub / "nextqa" / "NExTVideo" / "101.mp4"
        path.write_bytes(path.read_bytes()[:-500])
        assert run("nextqa", **VIDEO) == 1
        assert f"document 1: ValueError: video 0 of question 0: video {path} cannot be read" in one_line(capfd)


def encoded(picture) -> bytes:
    import io

    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=90)
    return out.getvalue()


@pytest.mark.parametrize(
    ("experiment", "model", "tasks", "runs", "visual"),
    [
        ("paper_video", "video_llava_7b", 4, 24, 2056),
        pytest.param("paper_image", "llava_1_5_7b", 10, 130, 576, marks=pytest.mark.slow),
    ],
)
def test_the_papers_experiments_are_possible_runs(checkpoints, monkeypatch, experiment, model, tasks, runs, visual):
    seen = []
    monkeypatch.setenv("SPARSEVLM_JUDGE", "some-model")
    monkeypatch.setattr(command_line, "run_series", lambda asked, command: seen.extend(asked) or 0)
    assert main([f"experiment={experiment}", f"model.pretrained={checkpoints[model]}"]) == 0
    assert len({r.run_id() for r in seen}) == runs and len({r.task for r in seen}) == tasks
    assert {(r.model.name, r.model.prompt, r.model.dtype, r.n_visual) for r in seen} == {
        (model, {576: "vicuna_v1", 2056: "llava_v1"}[visual], "float16", visual)
    }


@pytest.mark.slow
def test_two_processes_on_videos(hub, checkpoints):
    """lmms-eval waits for all processes when it has looked for videos, but only one of them looks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval.run"]
    command += ["model=video_llava_7b", f"model.pretrained={checkpoints['video_llava_7b']}", "task=nextqa"]
    command += ["max_new_tokens=2", "batch_size=1"]
    environment = {**os.environ, "PYTHONPATH": str(command_line.CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert metrics()["n"] == 2
