import json
import os
from pathlib import Path

import pytest
import yaml

from eval.errors import UserError
from eval.generate.ledger import Answer
from eval.runs import environment
from eval.runs import writer as results
from eval.runs.settings import make_run
from eval.runs.writer import RunFolder, cost, files, run_files
from sparsevlm.cost.flops import count
from tests.eval.runs.test_settings import compose


def folder_in(path) -> RunFolder:
    return RunFolder(path, "t__m__none__full__01234567")


class TestRunFolder:
    def test_appears_whole_and_without_the_ledger(self, tmp_path):
        folder = folder_in(tmp_path)
        folder.open()
        folder.ledger.write_text("{}\n{}\n")
        assert folder.answers_kept() == 2 and not folder.finished and not folder.path.exists()
        folder.publish({"metrics.json": "{}", "samples.jsonl": "\u00e4"})
        assert folder.finished and not folder.partial.exists()
        assert sorted(os.listdir(folder.path)) == ["metrics.json", "samples.jsonl"]
        assert (folder.path / "samples.jsonl").read_text(encoding="utf-8") == "\u00e4"

    def test_nothing_appears_when_writing_fails(self, tmp_path):
        folder = folder_in(tmp_path)
        folder.open()
        folder.ledger.write_text("{}\n")
        with pytest.raises(OSError):
            folder.publish({"metrics.json": "{}", "no/such/folder": ""})
        assert not folder.path.exists() and folder.answers_kept() == 1

    def test_a_folder_that_came_meanwhile_is_not_overwritten(self, tmp_path):
        folder = folder_in(tmp_path)
        folder.open()
        folder.path.mkdir()
        (folder.path / "metrics.json").write_text("theirs")
        with pytest.raises(OSError):
            folder.publish({"metrics.json": "ours"})
        assert (folder.path / "metrics.json").read_text() == "theirs"

    def test_something_else_in_its_place(self, tmp_path):
        folder = folder_in(tmp_path)
        folder.path.mkdir(parents=True)
        with pytest.raises(UserError, match="is not a finished run"):
            folder.open()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="Permission denied.*results_dir"):
            folder_in(tmp_path).open()

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write results to .*Not a directory"):
            folder_in(tmp_path / "file").open()

    def test_full_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr("eval.runs.writer._NEEDED_BYTES", 1 << 60)
        with pytest.raises(UserError, match="MB are free"):
            folder_in(tmp_path).open()


@pytest.fixture(scope="module")
def run():
    return make_run(compose("method=sparsevlm", "budget=64", "limit=4", "results_dir=here", "method.raters=all"))


TYPES = ["count", "read", "count", "read"]
SCORES = [1.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def written(run):
    """Parsed metrics.json, samples.jsonl and config.yaml of four answered questions."""
    answers = [
        Answer("minivqa", i, f"question {i}", f"answer {i}", 586 + i, 2, 576, 120.0 + i, 64.0, 0.5) for i in range(4)
    ]
    samples = [
        {
            "doc_id": i,
            "doc": {"question_type": t},
            "target": "x",
            "accuracy": s,
            f"accuracy_{t}": s,
            "other": {"a": 1},
            "f1": s,
        }
        for i, (t, s) in enumerate(zip(TYPES, SCORES, strict=True))
    ]
    aggregated = {
        "alias": "minivqa", "accuracy,none": 0.75, "accuracy_stderr,none": 0.1, "accuracy_count,none": 1.0,
        "accuracy_read,none": 0.5, "other,none": 3.0, "f1,none": 0.9,
    }  # fmt: skip
    content = files(run, samples, aggregated, answers, [], "python -m eval.run", {"metric": "accuracy"})
    assert set(content) == {"config.yaml", "metrics.json", "samples.jsonl", "env.json"}
    lines = [json.loads(line) for line in content["samples.jsonl"].splitlines()]
    return json.loads(content["metrics.json"]), lines, yaml.safe_load(content["config.yaml"])


class TestFiles:
    def test_the_contracts_keys(self, written, run):
        metrics, _, _ = written
        assert metrics["schema"] == 1
        assert (metrics["task"], metrics["model"], metrics["method"]) == ("minivqa", "mini", "sparsevlm")
        assert (metrics["budget"], metrics["n"], metrics["seed"]) == (64, 4, 0)
        assert metrics["options"]["raters"] == "all" and metrics["config_hash"] == run.config_hash()
        assert {"python", "torch", "transformers", "lmms-eval", "datasets", "sparsevlm"} <= set(metrics["versions"])
        assert {"cpu", "cores", "gpu"} <= set(metrics["hardware"])
        assert {"git", "date"} <= set(metrics)

    def test_metrics_with_intervals_by_type(self, written):
        found = written[0]["metrics"]
        assert set(found) == {"accuracy", "accuracy/count", "accuracy/read", "other", "f1"}
        low, high = found["accuracy"]["ci95"]
        assert found["accuracy"]["value"] == 0.75 and 0 <= low < 0.75 < high <= 1
        assert found["accuracy/count"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 2}
        assert found["other"]["ci95"] is None  # made of something else than a number per question
        assert found["f1"] == {"value": 0.9, "ci95": None, "n": 4}  # not their mean

    def test_means(self, written):
        metrics = written[0]
        assert metrics["tokens"] == {"visual": 576, "entering": 121.5, "leaving": 64}
        assert metrics["time"]["generate_s"] == 2.0 and metrics["time"]["samples_per_s"] == 2.0
        assert "not latency" in metrics["time"]["note"]

    def test_samples(self, written):
        lines = written[1]
        assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
        assert [line["scores"]["accuracy"] for line in lines] == SCORES
        assert lines[2]["answer"] == "answer 2" and lines[2]["question_type"] == "count" and lines[2]["entering"] == 122

    def test_the_configuration_makes_the_same_run_again(self, written, run):
        config = {**written[2], "results_dir": str(run.results_dir)}
        assert make_run(config).run_id() == run.run_id()

    def test_cost_is_that_of_the_median_question(self, written, run):
        counted = count(str(run.checkpoint), "sparsevlm", 64, 11, raters="all")
        assert written[0]["cost"] == {
            "text_tokens": 11, "prefill_gmacs": counted["llm_prefill"] + counted["method"],
            "method_gmacs": counted["method"], "vision_gmacs": counted["vision"],
            "projector_gmacs": counted["projector"], "first_token_gmacs": pytest.approx(sum(counted.values())
            - counted["decode"]), "decode_gmacs_per_token": counted["decode"],
        }  # fmt: skip
        assert counted["method"] > 0


def test_what_cannot_be_counted_is_null_and_says_why(tmp_path):
    run = make_run(compose("method=sparsevlm_rank", f"results_dir={tmp_path}"))
    found = cost(run, [Answer("minivqa", 0, "q", "a", 586, 2, 576, 500.0, 480.0, 0.5)])
    assert found["text_tokens"] == 10 and found["prefill_gmacs"] is None and found["note"]


class TestGit:
    """Which code made a run, where the tree changes while it runs or between a run's two halves."""

    COMMIT, OTHER = "a" * 40, "b" * 40

    @pytest.fixture
    def process(self, monkeypatch):
        """Begin a process in a checkout at this commit."""

        def begin(commit: str | None, dirty: bool = False) -> None:
            tree = None if commit is None else {"commit": commit, "dirty": dirty}
            monkeypatch.setattr(environment, "git", lambda: tree)
            environment.git_at_start.cache_clear()
            environment.git_at_start()

        yield begin
        environment.git_at_start.cache_clear()

    def opened(self, path, *processes, process) -> RunFolder:
        folder = folder_in(path)
        for commit, dirty in processes:
            process(commit, dirty)
            folder.open()
        return folder

    @pytest.mark.parametrize(("at_start", "at_end"), [(True, False), (False, True)])
    def test_it_is_read_when_a_run_starts(self, tmp_path, process, monkeypatch, at_start, at_end):
        folder = self.opened(tmp_path, (self.COMMIT, at_start), process=process)
        monkeypatch.setattr(environment, "git", lambda: {"commit": self.OTHER, "dirty": at_end})
        found = run_files({}, {}, [], "x", folder.git())
        for name in ("env.json", "metrics.json"):
            assert json.loads(found[name])["git"] == {"commit": self.COMMIT, "dirty": at_start}

    @pytest.mark.parametrize(
        ("processes", "dirty"),
        [
            ([(COMMIT, False), (COMMIT, False)], False),
            ([(COMMIT, True), (COMMIT, False)], True),
            ([(COMMIT, False), (COMMIT, True)], True),
            ([(OTHER, False), (COMMIT, False)], True),
            ([(None, False), (COMMIT, False)], True),
        ],
    )
    def test_a_resumed_run_is_clean_if_all_its_processes_were(self, tmp_path, process, processes, dirty):
        folder = self.opened(tmp_path, *processes, process=process)
        assert folder.git() == {"commit": self.COMMIT, "dirty": dirty}

    def test_a_torn_note_is_no_clean_one(self, tmp_path, process):
        folder = self.opened(tmp_path, (self.COMMIT, False), process=process)
        with open(folder.partial / "started.jsonl", "a") as file:
            file.write('{"commit": "aa')
        folder.open()
        assert folder.git() == {"commit": self.COMMIT, "dirty": True}

    def test_outside_a_checkout(self, tmp_path, process):
        assert self.opened(tmp_path, (None, False), process=process).git() is None

    def test_the_note_goes_with_the_answers(self, tmp_path, process):
        for keep in (False, True):
            folder = self.opened(tmp_path / str(keep), (self.COMMIT, False), process=process)
            folder.publish({"metrics.json": "{}"}, keep_answers=keep)
            assert (folder.path / "started.jsonl").is_file() == keep


def test_every_measurement_goes_through_the_one_writer():
    """No other module makes the block of versions, hardware and git of a run folder."""
    root = Path(results.__file__).parents[2]
    sources = [p for room in ("eval", "scripts", "sparsevlm") for p in (root / room).rglob("*.py")]
    writers = {str(p.relative_to(root)) for p in sources if '"metrics.json":' in p.read_text(encoding="utf-8")}
    assert writers == {"eval/runs/writer.py"}
