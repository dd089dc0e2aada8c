"""The command line in-process: what it says, what it leaves behind, and its exit status."""

import json
import os
from pathlib import Path

import pytest
import torch

import sparsevlm  # noqa: F401  # isort: skip  - before transformers

from transformers import LlavaForConditionalGeneration

from eval import run
from eval.measure import latency
from eval.run import main
from eval.runs import digests, evaluate, series

FAST = ["method=random", "budget=16", "limit=4", "batch_size=2"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEVLM_TRACEBACK", raising=False)


def folders() -> list[str]:
    return sorted(os.listdir("results/runs")) if os.path.isdir("results/runs") else []


def breaking(monkeypatch, at: int, *errors: BaseException) -> list[int]:
    """Let the calls of generate() from the `at`-th on raise; returns the list of batch sizes that were asked for."""
    original, asked = LlavaForConditionalGeneration.generate, []

    def generate(self, **kwargs):
        asked.append(len(kwargs["input_ids"]))
        if 0 <= len(asked) - at < len(errors):
            raise errors[len(asked) - at]
        return original(self, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)
    return asked


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["method=sparsvlm"], "unknown method 'sparsvlm'. Did you mean 'sparsevlm'?"),
            (["model=minni"], "unknown model 'minni'. Did you mean 'mini'?"),
            (["task=minivq"], "unknown task 'minivq'. Did you mean 'minivqa'?"),
            (["experiment=reproduc"], "unknown experiment 'reproduc'. Did you mean 'reproduce'?"),
            (["limt=3"], "unknown config key 'limt'. Did you mean 'limit'?"),
            (["+limt=3"], "unknown config key 'limt'. Did you mean 'limit'?"),
            (
                ["method=sparsevlm", "method.rater=all"],
                "unknown config key 'method.rater'. Did you mean 'method.raters'?",
            ),
            (["method=sparsevlm", "method.raters=some"], "'some' is unknown; known: paper, all"),
            (["method=sparsevlm", "budget=0"], "budget 0 is below 1"),
            (["method=sparsevlm", "budget=10000"], "budget 10000 is above the 576 visual tokens"),
            (["method=none", "budget=10000"], "budget 10000 is above the 576 visual tokens"),
            (["budget=abc"], "budget 'abc' is neither an integer nor 'full'"),
            (["limit=none"], "limit=none must be an integer of 1 or more"),
            (["on_error=skip"], "unknown on_error 'skip'. Known: record, stop"),
            (["feature_mb=-1"], "feature_mb=-1 must be an integer of 0 or more"),
            (["limit"], "cannot read the argument 'limit'. Use key=value, for example limit=100"),
            (["budget=64,32"], "budget=64,32 lists several values. Use -m before it to run each of them"),
            (["raters=all", "method=sparsevlm"], "unknown config key 'raters'. Did you mean 'method.raters'?"),
            (["task=hallusion_bench_image"], "Declare a further task of lmms-eval in eval/tasks/further.py"),
            (["results_dir=file"], "cannot write results to file/runs: Not a directory; set results_dir"),
            (["model.pretrained=./nowhere"], "there is no checkpoint folder './nowhere'"),
            (["model.prompt=vicuna_v1"], "vocabulary cannot spell the prompt 'vicuna_v1'; use prompt='hub'"),
            (["experiment=reproduce", "budget=3"], "this experiment sets budget itself. Leave budget=... out"),
        ],
    )
    def test_one_line_and_status_2(self, arguments, message, capfd):
        Path("file").touch()
        assert main([*arguments, *(["limit=2"] if "limit" not in arguments[0] else [])]) == 2
        out, err = capfd.readouterr()
        assert err.count("\n") == 1 and err.startswith("error: ") and message in err
        assert not any(name.startswith("minivqa") for name in folders())

    def test_the_traceback_is_there_for_those_who_ask(self, monkeypatch, capfd):
        monkeypatch.setenv("SPARSEVLM_TRACEBACK", "1")
        assert main(["method=sparsevlm", "budget=0"]) == 2
        assert "Traceback" in capfd.readouterr().err

    def test_a_checkpoint_that_lacks_weights(self, tmp_path, capfd):
        from safetensors.torch import load_file, save_file

        from sparsevlm.mini import weights_dir

        for path in weights_dir().iterdir():
            (tmp_path / "copy").mkdir(exist_ok=True)
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
        weights = load_file(tmp_path / "copy" / "model.safetensors")
        weights.pop(next(iter(weights)))
        save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
        assert main(["model.pretrained=./copy", "limit=2"]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1].startswith("error: cannot load the model mini: './copy' lacks 1 weights")


class TestFinishedRuns:
    def test_are_there_once_and_never_touched_again(self, monkeypatch, capfd):
        assert main(FAST) == 0
        (name,) = folders()
        assert name.startswith("minivqa__mini__random__16__")
        folder = Path("results/runs", name)
        assert sorted(os.listdir(folder)) == ["config.yaml", "env.json", "metrics.json", "samples.jsonl"]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["n"] == 4 and metrics["tokens"]["leaving"] == 16
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert sum(s["scores"]["accuracy"] for s in samples) / 4 == metrics["metrics"]["accuracy"]["value"]
        assert "-> results/runs/" in capfd.readouterr().out
        before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
        monkeypatch.setattr(evaluate, "_load", None)  # not needed
        assert main([*FAST, "batch_size=3"]) == 0
        assert capfd.readouterr().out == f"already there: {folder}\n"
        assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
        assert os.listdir() == ["results"]  # Hydra left nothing

    def test_lmms_evals_score_is_ours(self):
        """The pictures, questions and answers really reach the model: it is right far more often than by guessing."""
        assert main(["limit=8"]) == 0
        metrics = json.loads(Path("results/runs", folders()[0], "metrics.json").read_text())
        assert metrics["metrics"]["accuracy"]["value"] >= 0.5
        assert metrics["tokens"] == {"visual": 576, "entering": 576, "leaving": 576}


class TestFailures:
    def test_an_exception_gives_status_1_no_results_and_keeps_what_was_answered(self, monkeypatch, capfd):
        with monkeypatch.context() as patch:
            breaking(patch, 2, RuntimeError("some\nthing"), RuntimeError("some\nthing"))
            assert main(FAST) == 1
        err = capfd.readouterr().err
        (name,) = folders()
        assert name.startswith(".minivqa__mini__random__16__") and name.endswith(".partial")
        assert sorted(os.listdir(Path("results/runs", name))) == ["ledger.jsonl", "started.jsonl"]
        message = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(message) == 1 and "2 answers are kept" in message[0] and "some thing" in message[0]
        assert "task minivqa, document " in message[0] and "Traceback" not in err

        asked = breaking(monkeypatch, 0)
        assert main(FAST) == 0
        assert asked == [2]  # the other two were not asked again
        assert [n for n in folders() if n.startswith(".")] == []

    def test_interrupted(self, monkeypatch, capfd):
        breaking(monkeypatch, 2, KeyboardInterrupt())
        assert main(FAST) == 130
        assert "interrupted: 2 answers are kept; rerun the same command to resume" in capfd.readouterr().err
        assert main(FAST) == 0

    def test_a_question_without_a_score_is_a_failure(self, monkeypatch, capfd):
        import lmms_eval.evaluator

        original = lmms_eval.evaluator.evaluate

        def loses_one(**kwargs):
            results = original(**kwargs)
            results["samples"]["minivqa"].pop()
            return results

        monkeypatch.setattr(lmms_eval.evaluator, "evaluate", loses_one)
        assert main(FAST) == 1
        assert "4 questions were to be scored, 3 were" in capfd.readouterr().err
        assert all(name.startswith(".") for name in folders())


class TestRecordedFailures:
    def spoil(self, monkeypatch, *bad: int):
        """Let the pictures of some documents be unreadable."""
        from eval.generate.generator import Generator

        original = Generator._prepare

        def prepare(self, batch):
            if {r.args[3] for r in batch} & set(bad):
                raise OSError("image file is truncated")
            return original(self, batch)

        monkeypatch.setattr(Generator, "_prepare", prepare)

    def test_are_left_out_counted_and_named(self, monkeypatch, capfd):
        with monkeypatch.context() as patch:
            self.spoil(patch, 2)
            assert main([*FAST, "on_error=record"]) == 3
        (name,) = folders()
        folder = Path("results/runs", name)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["n"], metrics["excluded"], metrics["metrics"]["accuracy"]["n"]) == (3, 1, 3)
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [s["doc_id"] for s in samples] == [0, 1, 3]
        (left_out,) = [json.loads(line) for line in (folder / "excluded.jsonl").read_text().splitlines()]
        assert left_out["doc_id"] == 2 and left_out["error"] == "OSError: image file is truncated"
        assert "1 questions EXCLUDED" in capfd.readouterr().out
        assert main([*FAST, "on_error=record"]) == 3  # a finished run that leaves something out stays one
        assert "already there" in (out := capfd.readouterr().out) and "EXCLUDED" in out
        assert main([*FAST, "results_dir=whole"]) == 0
        whole = next(Path("whole/runs").iterdir())
        answers = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
        assert [(a["doc_id"], a["answer"]) for a in answers if a["doc_id"] != 2] == [
            (s["doc_id"], s["answer"]) for s in samples
        ]

    def test_are_asked_again_in_the_next_attempt(self, monkeypatch, capfd):
        with monkeypatch.context() as patch:
            self.spoil(patch, 2)
            breaking(patch, 2, KeyboardInterrupt())
            assert main([*FAST, "on_error=record", "batch_size=1"]) == 130
        assert main([*FAST, "on_error=record", "batch_size=1"]) == 0
        (name,) = folders()
        assert json.loads(Path("results/runs", name, "metrics.json").read_text())["excluded"] == 0

    def test_a_run_of_failures_has_no_results(self, monkeypatch, capfd):
        self.spoil(monkeypatch, 0, 1, 2, 3)
        assert main([*FAST, "on_error=record"]) == 1
        assert "not one question could be answered; the first: OSError" in capfd.readouterr().err
        assert all(name.startswith(".") for name in folders())


class TestMultirun:
    def test_every_job_and_none_only_once(self, monkeypatch, capfd):
        done = []

        def execute(jobs, command, progress, processes):
            done.append([job.run.label for job in jobs])
            for job in jobs:
                job.folder.open()
                metrics = {"metrics": {"accuracy": {"value": 1, "ci95": None}}, "tokens": {"entering": 1, "leaving": 1}}
                job.folder.publish({"metrics.json": json.dumps(metrics)})

        monkeypatch.setattr(evaluate, "execute", execute)
        assert main(["-m", "method=none,random", "budget=64,100"]) == 0
        assert done == [["none budget=full", "random budget=64", "random budget=100"]]  # in one go
        assert "ignoring budget=64: method=none keeps all tokens" in capfd.readouterr().out
        assert os.listdir() == ["results"]

    def test_what_differs_in_more_than_the_method_runs_apart(self, monkeypatch):
        done = []
        monkeypatch.setattr(evaluate, "execute", lambda jobs, *_: done.append([job.run.label for job in jobs]) or 1 / 0)
        assert main(["-m", "method=random", "budget=64,32", "limit=2,3", "task.seed=0,1"]) == 1
        assert [len(together) for together in done] == [2, 2, 2, 2]

    def test_a_wrong_job_does_not_stop_the_others(self, capfd):
        assert main(["-m", "method=random", "budget=64,10000,32", "limit=2"]) == 2
        assert len(folders()) == 2
        err = capfd.readouterr().err
        assert err.count("error: ") == 1 and "budget=10000 limit=2: budget 10000 is above" in err

    def test_a_method_that_fails_does_not_stop_the_others(self, monkeypatch, capfd):
        from sparsevlm.methods.fastv import FastV

        monkeypatch.setattr(FastV, "score", lambda *_: 1 / 0)
        assert main(["-m", "method=random,fastv", "budget=64", "limit=2"]) == 1
        out, err = capfd.readouterr()
        assert [n.split("__")[2] for n in folders() if not n.startswith(".")] == ["random"]
        assert "fastv__64" in err and "document 0: ZeroDivisionError" in err
        assert "1 of 2 runs have no results; rerun the same command to resume" in out

    def test_a_task_that_fails_does_not_stop_those_after_it(self, monkeypatch, capfd):
        original = digests.load_questions
        broken = lambda settings, *rest: original(settings, *rest) if settings.seed else 1 / 0  # noqa: E731
        broken.cache_clear = original.cache_clear
        monkeypatch.setattr(digests, "load_questions", broken)
        assert main(["-m", "method=random", "budget=16", "limit=2", "task.seed=0,1"]) == 1
        assert [n.startswith(".") for n in folders()] == [False]  # without its questions, a run has no name
        assert "ZeroDivisionError" in capfd.readouterr().err

    def test_an_unknown_name_is_told_before_anything_runs(self, monkeypatch, capfd):
        monkeypatch.setattr(evaluate, "execute", lambda *_: pytest.fail("started"))
        assert main(["-m", "method=random,randm", "budget=64"]) == 2
        assert "unknown method 'randm'" in capfd.readouterr().err


class TestExperiments:
    def listed(self, monkeypatch, *arguments: str, status: int = 0):
        seen = {}
        monkeypatch.setattr(run, "run_series", lambda runs, command: seen.update(runs=runs, command=command) or status)
        monkeypatch.setattr(run, "time_runs", lambda runs, **options: seen.update(timed=runs, **options) or 0)
        assert main(["experiment=reproduce", *arguments]) == status
        return seen

    def test_reproduce(self, monkeypatch):
        seen = self.listed(monkeypatch, "results_dir=elsewhere")
        budgets = [192, 128, 64]
        assert [r.label for r in seen["runs"]] == [
            "none budget=full",
            *(f"random budget={b}" for b in budgets),
            *(f"random_layer match=sparsevlm budget={b}" for b in budgets),
            *(f"sparsevlm budget={b}" for b in budgets),
            *(f"sparsevlm raters=all budget={b}" for b in budgets),
        ]
        assert {str(r.results_dir) for r in seen["runs"]} == {"elsewhere"}
        assert len({r.limit for r in seen["runs"]}) == 1 and seen["runs"][0].limit >= 400
        assert seen["timed"] == seen["runs"] and seen["repeats"] >= 10
        assert seen["command"] == "python -m eval.run experiment=reproduce results_dir=elsewhere"

    def test_the_command_line_wins_over_the_file(self, monkeypatch):
        seen = self.listed(monkeypatch, "limit=7", "task.seed=3")
        assert {(r.limit, r.task.seed) for r in seen["runs"]} == {(7, 3)}

    def test_nothing_is_timed_after_a_failure(self, monkeypatch):
        assert "timed" not in self.listed(monkeypatch, status=1)

    def test_settings_are_timed_at_the_median_prompt(self, monkeypatch):
        runs = self.listed(monkeypatch, "limit=3")["runs"]
        for text_tokens, job in enumerate(runs):
            folder = series.RunFolder(job.results_dir, job.run_id())
            folder.open()
            folder.publish({"metrics.json": json.dumps({"cost": {"text_tokens": text_tokens}})})
        given = {}

        def measure(net, settings, text_tokens, batch_size, repeats, warmup, decode_tokens, **more):
            given.update(settings=settings, text_tokens=text_tokens, rounds=(repeats, warmup), dtype=net.dtype)
            return []

        monkeypatch.setattr(latency, "measure", measure)
        assert latency.time_runs(runs, repeats=5, warmup=1, command="python -m eval.run x") == 0
        assert given["settings"][0] == ("none", "full", {}) and given["settings"][-1] == (
            "sparsevlm", 64, {"raters": "all"},
        )  # fmt: skip
        assert len(given["settings"]) == 13
        assert given["text_tokens"] == 6 and given["rounds"] == (5, 1) and given["dtype"] == torch.float32
        (folder,) = Path("results/runs").glob("latency__mini__*")
        assert json.loads((folder / "env.json").read_text())["command"] == "python -m eval.run x"

    def test_what_cannot_be_timed_is_one_line(self, monkeypatch, capsys):
        runs = self.listed(monkeypatch, "limit=3")["runs"][:1]
        folder = series.RunFolder(runs[0].results_dir, runs[0].run_id())
        folder.open()
        folder.publish({"metrics.json": json.dumps({"cost": {"text_tokens": 4}})})
        monkeypatch.setattr(latency, "measure", lambda *a, **k: 1 / 0)
        monkeypatch.setattr(latency, "fingerprint", lambda *a: (_ for _ in ()).throw(ValueError("not so")))
        assert latency.time_runs(runs, repeats=1, warmup=0, command="") == 2
        assert capsys.readouterr().err == "error: latency: not so\n"


def test_checkpoint_in_the_hubs_layout_from_config_to_score(tiny_llava_folder):
    """LLaVA-1.5-7B's path: config, processor, chat template, pruning, generation, scoring."""
    same = [
        "method=sparsevlm",
        "budget=192",
        f"model.pretrained={tiny_llava_folder}",
        "batch_size=2",
        "max_new_tokens=3",
    ]
    assert main(["model=llava_1_5_7b", "limit=4", *same]) == 0
    assert main(["experiment=llava_1_5_7b_paper", "limit=2", *same]) == 0
    lengths = set()
    for name in folders():
        assert name.startswith("minivqa__llava_1_5_7b__sparsevlm__192__")
        metrics = json.loads(Path("results/runs", name, "metrics.json").read_text())
        assert metrics["n"] in (2, 4) and metrics["tokens"]["visual"] == 576
        assert metrics["tokens"]["leaving"] == 192.03125  # the authors' own count of their lists
        lengths.add(metrics["cost"]["text_tokens"])
    assert len(lengths) == 2  # vicuna_v1 has a sentence before the question
