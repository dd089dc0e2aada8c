"""The benchmark: what is asked for is checked first, every round is kept, and nothing is measured twice or mixed."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from sparsevlm.cost import bench, memory, networks, report
from sparsevlm.cost.harness import Harness
from sparsevlm.cost.ledger import Ledger
from tests.models.test_imports import OPTIONAL

QUICK = "--shape llama-64x4 --prompt 5+40+15 --methods sparsevlm --budgets 16 --repeats 2 --warmup 1 --decode-tokens 1"


def start(out, text=QUICK):
    bench.main(["--device", "cpu", "--threads", "1", "--out", str(out), *text.split()])


def rows_of(out):
    return json.loads((out / "latency.json").read_text())["rows"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    start(out, QUICK + " --setting sparsevlm::layers=(1,):keep=(10,):early_drop=False --batch 1,2")
    return out


def test_every_setting_of_every_group_has_its_rounds_facts_and_comparisons(finished):
    rows = rows_of(finished)
    assert [(r["batch_size"], r["method"], r["budget"]) for r in rows] == [
        (b, *s) for b in (1, 2) for s in (("none", "full"), ("sparsevlm", 16), ("sparsevlm", None))
    ]
    for row in rows:
        assert (row["shape"], row["prompt"], row["dtype"], row["threads"]) == ("llama-64x4", "5+40+15", "float32", 1)
        assert row["n"] == 2 and row["failed"] is None
        assert row["kv_bytes"] == [row["batch_size"] * n * 2 * 64 * 4 for n in row["lengths"]]
        full = next(r for r in rows if r["method"] == "none" and r["batch_size"] == row["batch_size"])
        assert row["gmacs_ratio"] == full["gmacs"] / row["gmacs"]
        assert row["speedup"]["median"] == pytest.approx(1 / row["prefill_ratio"]["median"])
        assert (row["overhead"] is None) == (row["method"] == "none")
    plain = rows[2]
    assert plain["options"] == {"layers": [1], "keep": [10], "early_drop": False}
    pool = int(0.3 * 30) + 1
    assert plain["lengths"] == [60, 60, *[20 + 10 + pool // 10 + 1] * 2]
    assert rows[1]["gmacs_ratio"] > 1.2 and "scores" in rows[1]["parts_ms"]


def test_the_report_says_what_was_measured_on_what(finished):
    text = (finished / "latency.md").read_text()
    assert "## llama-64x4, batch 2" in text and "5 text, 40 visual and 15 text tokens; float32, sdpa" in text
    assert "1 thread; 2 rounds, 1 decode steps" in text and torch.__version__ in text
    row = rows_of(finished)[1]
    assert f"| sparsevlm | 16 | {row['leaving']:.1f} | {row['prefill_ms']['median']:.1f} [" in text
    assert "| sparsevlm (layers=[1], keep=[10], early_drop=false) | explicit |" in text
    with open(finished / "latency.csv", newline="") as file:
        flat = list(csv.DictReader(file))
    assert len(flat) == 6 and float(flat[1]["prefill_ms"]) == row["prefill_ms"]["median"]
    assert float(flat[1]["scores_ms"]) == row["parts_ms"]["scores"]["median"]


def test_the_verdict_names_what_is_slow():
    def row(method, budget, speedup, macs):
        return {"method": method, "budget": budget, "options": {}, "speedup": {"median": speedup}, "gmacs_ratio": macs}

    rows = [row("none", "full", 1.0, 1.0), row("a", 64, 0.99, 3.0), row("b", 64, 2.8, 3.0), row("c", 64, 2.6, 3.0)]
    rows += [row("d", None, 0.5, None), {"method": "e", "budget": 64, "options": {}, "failed": "out of memory"}]
    text = report.verdict(rows)
    assert "Slower than the unpruned model: a 64, d, of 4 settings." in text
    assert "Below 90 % of the MAC ratio: a 64, c 64, of 4 settings." in text


def test_the_report_comes_from_the_ledger_alone(finished, tmp_path, capsys):
    (tmp_path / "ledger.jsonl").write_bytes((finished / "ledger.jsonl").read_bytes())
    report.main([str(tmp_path)])
    for name in ("latency.json", "latency.md", "latency.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(SystemExit, match="not there or empty"):
        report.main([str(tmp_path / "nothing")])


def test_what_is_finished_is_not_measured_again(tmp_path, monkeypatch):
    start(tmp_path)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(networks, "network", lambda *a: pytest.fail("made a model"))
    start(tmp_path)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_an_interrupted_benchmark_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    original, numbers = Harness.round, []

    def interrupted(self, number, which):
        if number == 1:
            raise KeyboardInterrupt
        return original(self, number, which)

    with monkeypatch.context() as patch:
        patch.setattr(Harness, "round", interrupted)
        with pytest.raises(SystemExit) as stop:
            start(tmp_path)
    assert stop.value.code == 130 and "goes on from there" in capsys.readouterr().err
    kept = (tmp_path / "ledger.jsonl").read_bytes()
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"group": {"shape": "llama-64x4", "pro')  # cut off by a power failure
    monkeypatch.setattr(Harness, "round", lambda self, n, w: (numbers.append((n, w)), original(self, n, w))[1])
    start(tmp_path, QUICK.replace("--budgets 16", "--budgets 16,8"))  # and one more setting
    assert numbers == [(-1, [0, 1, 2]), (0, [2]), (1, [0, 1, 2])]
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(kept)
    assert [r["n"] for r in rows_of(tmp_path)] == [2, 2, 2]
    for record in Ledger(tmp_path).records.values():  # each round of a setting has its own unpruned time
        assert all(sample.unpruned > 0 for sample in record.samples.values())


def test_out_of_memory_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    original = Harness._sample

    def sample(self, i, **kwargs):
        if i == 0 and len(self.prompt.visual_mask) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, i, **kwargs)

    monkeypatch.setattr(Harness, "_sample", sample)
    start(tmp_path, QUICK + " --batch 1,2")
    rows = rows_of(tmp_path)
    assert [r["failed"] for r in rows] == [None, None, "out of memory", None]
    assert rows[3]["prefill_ms"]["median"] > 0 and rows[3]["speedup"] is None and rows[3]["overhead"] is not None
    assert "| none | full | out of memory |" in (tmp_path / "latency.md").read_text()
    monkeypatch.setattr(networks, "network", lambda *a: pytest.fail("tried again"))
    start(tmp_path, QUICK + " --batch 1,2")


def test_other_errors_are_not_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Harness, "forward", lambda self: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        start(tmp_path)


def test_a_shape_that_does_not_fit_stops_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: memory.GIB)
    monkeypatch.setattr(networks, "network", lambda *a: pytest.fail("made a model"))
    with pytest.raises(SystemExit) as stop:
        start(tmp_path / "new", QUICK.replace("llama-64x4 --prompt 5+40+15", "llama-64x4 llava-1.5-7b"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "llava-1.5-7b at batch 1 in float32 needs" in error and "missing" in error
    assert not (tmp_path / "new").exists()


def test_times_of_another_machine_or_code_do_not_mix(tmp_path, monkeypatch, capsys):
    start(tmp_path)
    here = bench.machine(torch.device("cpu"))
    monkeypatch.setattr(bench, "machine", lambda device: {**here, "cpu": "another"})
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, QUICK.replace("--repeats 2", "--repeats 3"))
    assert stop.value.code == 2 and "'another'" in capsys.readouterr().err


def test_two_processes_do_not_write_to_one_folder(tmp_path, capsys):
    first = Ledger(tmp_path)
    first.open({"cpu": "x"})
    with pytest.raises(OSError, match="another process"):
        Ledger(tmp_path).open({"cpu": "x"})


def test_a_foreign_ledger_is_refused(tmp_path, capsys):
    (tmp_path / "ledger.jsonl").write_text('{"machine": {}, "schema": 99}\n')
    with pytest.raises(SystemExit) as stop:
        start(tmp_path)
    assert stop.value.code == 2 and "schema is 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--shape llama-64", "write llama-<hidden>x<layers>"),
        ("--shape llava-2", "no shapes for model 'llava-2'"),
        ("--prompt 5+40", "as 35+576+25"),
        ("--prompt 5+x+3", "whole numbers"),
        ("--prompt 5+40+1", "two or more must follow"),
        ("--shape mini --prompt 5+40+15", "a picture of this model has 576"),
        ("--methods sparsvlm", "unknown method"),
        ("--methods visionzip", "acts in the vision tower"),
        ("--budgets 41", "above the 40 visual tokens"),
        ("--setting sparsevlm:16:ratrs=all", "no option 'ratrs'"),
        ("--setting sparsevlm:16:raters", "method:budget[:option=value...]"),
        ("--batch 0", "batch_size=0"),
        ("--repeats 0", "at least 1"),
        ("--device cuda:99", "no device"),
        ("--attention flash_attention_2", "not installed"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path / "new", f"{QUICK} {text}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and not (tmp_path / "new").exists()


def test_all_methods_are_those_that_the_model_can_run(capsys):
    args = bench._parser().parse_args([*QUICK.split(), "--methods", "all", "--out", "x"])
    names = {name for work in bench.plan(args) for name, _, _ in work.settings}
    assert {"sparsevlm", "sparsevlm_rank", "fastv", "random", "pyramiddrop"} <= names
    assert not names & {"none", "tome", "visionzip", "anchorprune", "cdpruner"}
    assert "left out for llama-64x4: tome" in capsys.readouterr().err
    args = bench._parser().parse_args(["--shape", "llava-1.5-7b", "video-llava-7b", "--methods", "all", "--out", "x"])
    for work in bench.plan(args):
        assert {"tome", "visionzip", "sparsevlm"} <= {name for name, _, _ in work.settings}


def test_torch_and_transformers_are_all_it_needs(tmp_path):
    code = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None
from sparsevlm.cost import bench
bench.main({[*QUICK.split(), "--device", "cpu", "--out", str(tmp_path)]!r})
assert not any(name.partition(".")[0] in ("eval", "scripts") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "latency.md" in done.stdout and len(rows_of(tmp_path)) == 2
