"""Latency of models with random weights: what is asked for is checked first, every round is kept, nothing is mixed."""

import json

import pytest
import torch

from eval.measure import latency
from eval.runs import environment
from eval.runs.reader import read_run, read_runs
from eval.runs.writer import RunFolder
from scripts.tables.latency import gmacs_ratio, latency_tables, speedup
from sparsevlm.cost import memory, networks
from sparsevlm.cost.harness import Harness

QUICK = "--shape llama-64x4 --prompt 5+40+15 --methods sparsevlm --budgets 16 --repeats 2 --warmup 1 --decode-tokens 1"


def start(results, text=QUICK):
    latency.main(["--device", "cpu", "--threads", "1", "--results", str(results), *text.split()])


def rows_of(results):
    return [row for run in read_runs(results) for row in run.metrics["rows"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    results = tmp_path_factory.mktemp("bench")
    start(results, QUICK + " sparsevlm::layers=(1,):keep=(10,):early_drop=False --batch-size 1,2")
    return sorted(read_runs(results), key=lambda run: run.config["batch_size"])


def test_every_setting_of_every_run_has_its_rounds_facts_and_comparisons(finished):
    assert [run.folder.name.rpartition("__")[0] for run in finished] == ["latency__llama-64x4"] * 2
    for batch, run in enumerate(finished, 1):
        rows = run.metrics["rows"]
        assert [(r["method"], r["budget"]) for r in rows] == [
            ("none", "full"), ("sparsevlm", 16), ("sparsevlm", "explicit"),
        ]  # fmt: skip
        about = {key: run.config[key] for key in ("shape", "prompt", "dtype", "attention", "device")}
        assert about == {"shape": "llama-64x4", "prompt": "5+40+15", "dtype": "float32", "attention": "sdpa",
                         "device": "cpu"}  # fmt: skip
        assert run.config["model"] == {"name": "llama-64x4", "weights": "random"} and run.metrics["n"] == 2
        assert run.metrics["hardware"]["threads"] == 1
        for row in rows:
            assert (row["batch_size"], row["text_tokens"], row["visual_tokens"]) == (batch, 20, 40)
            assert row["kv_bytes"] == [batch * n * 2 * 64 * 4 for n in row["lengths"]]
            assert gmacs_ratio(row, rows[0]) == rows[0]["gmacs"] / row["gmacs"]
            assert speedup(row)["median"] == pytest.approx(1 / row["prefill_ratio"]["median"])
            assert (row["overhead"] is None) == (row["method"] == "none")
        plain = rows[2]
        assert plain["options"]["layers"] == [1] and plain["options"]["early_drop"] is False
        pool = int(0.3 * 30) + 1
        assert plain["lengths"] == [60, 60, *[20 + 10 + pool // 10 + 1] * 2]
        assert gmacs_ratio(rows[1], rows[0]) > 1.2 and "scores" in rows[1]["parts_ms"]
        assert len(run.samples) == 3 * 2


def test_the_tables_say_what_was_measured_on_what(finished):
    table, parts = latency_tables(finished[1])
    row = finished[1].metrics["rows"][1]
    assert "2 interleaved rounds at batch 2 and 5+40+15 tokens, float32, sdpa on" in table.caption
    assert "1 thread" in table.caption and "of 2 settings" in table.caption
    cells = {tuple(line[:2]): line for line in table.texts}
    assert cells["sparsevlm", "16"][3:5] == [
        f"{row['leaving']:.1f}",
        "{median:.1f} [{q25:.1f}, {q75:.1f}]".format(**row["prefill_ms"]),
    ]
    assert ("sparsevlm (layers=1, keep=10, early_drop=False)", "explicit") in cells
    scores = dict(zip(parts.columns, parts.texts[0], strict=True))["scores"]
    assert scores == f"{row['parts_ms']['scores']['median']:.2f}"


def test_the_verdict_names_what_is_slow(finished):
    run = finished[0]

    def row(method, fast, macs):
        ratio = {"median": 1 / fast, "q25": 1 / fast, "q75": 1 / fast}
        return {"method": method, "budget": 64, "options": {}, "prefill_ratio": ratio, "gmacs": macs and 3.0 / macs} | {
            "batch_size": 1, "text_tokens": 20,
        }  # fmt: skip

    rows = [row("none", 1.0, 1.0), row("a", 0.99, 3.0), row("b", 2.8, 3.0), row("c", 2.6, 3.0), row("d", 0.5, None)]
    rows.append({"method": "e", "budget": 64, "options": {}, "failed": "out of memory"})
    table, *_ = latency_tables(type(run)(run.folder, run.config, run.metrics | {"rows": rows}))
    assert "Slower than the unpruned model: a 64, d 64, of 4 settings." in table.caption
    assert "Below 90 % of the MAC ratio: a 64, c 64, of 4 settings." in table.caption
    assert table.texts[-1][:3] == ["e", "64", "out of memory"]


def test_what_is_finished_is_not_measured_again(tmp_path, monkeypatch, capsys):
    start(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    before = (folder / "metrics.json").read_bytes()
    monkeypatch.setattr(networks, "network", lambda *a: pytest.fail("made a model"))
    capsys.readouterr()
    start(tmp_path)
    assert capsys.readouterr().out == f"already there: {folder}\n" and (folder / "metrics.json").read_bytes() == before


def test_an_interrupted_measurement_resumes(tmp_path, monkeypatch, capsys):
    original, numbers = Harness.round, []

    def interrupted(self, number, which):
        if number == 2:
            raise KeyboardInterrupt
        return original(self, number, which)

    text = QUICK.replace("--budgets 16", "--budgets 16,8")
    with monkeypatch.context() as patch:
        patch.setattr(Harness, "round", interrupted)
        with pytest.raises(SystemExit) as stop:
            start(tmp_path, text)
    assert stop.value.code == 130 and "Rerun the same command to resume" in capsys.readouterr().err
    (partial,) = (tmp_path / "runs").iterdir()
    kept = [json.loads(line) for line in (partial / "ledger.jsonl").read_text().splitlines()]
    with open(partial / "ledger.jsonl", "ab") as file:
        file.write(b'{"by": [{"commit": "pro')  # cut off by a power failure
    monkeypatch.setattr(Harness, "round", lambda self, n, w: (numbers.append((n, w)), original(self, n, w))[1])
    start(tmp_path, text)
    assert numbers == [(0, [0, 1, 2]), (2, [0, 1, 2])]  # warm-up, and the round that lacked
    run = read_run(RunFolder(tmp_path, partial.name[1:].removesuffix(".partial")).path)
    first = {row["key"][2]: row["value"]["prefill"] for row in kept if row["key"][:2] == ["sample", 0]}
    assert [s["prefill_ms"] for s in run.samples if s["round"] == 0] == [first[i] for i in range(3)]
    assert not (run.folder / "ledger.jsonl").exists()


def test_rounds_of_other_code_do_not_mix(tmp_path, monkeypatch):
    original = Harness.round

    def interrupted(self, number, which):
        if number == 2:
            raise KeyboardInterrupt
        return original(self, number, which)

    with monkeypatch.context() as patch:
        patch.setattr(Harness, "round", interrupted)
        with pytest.raises(SystemExit):
            start(tmp_path)
    monkeypatch.setattr(environment, "git_at_start", lambda: {"commit": "f" * 40, "dirty": False})
    numbers = []
    monkeypatch.setattr(Harness, "round", lambda self, n, w: (numbers.append(n), original(self, n, w))[1])
    start(tmp_path)
    assert numbers == [0, 1, 2]


def test_another_machine_has_its_own_folder(tmp_path, monkeypatch):
    start(tmp_path)
    here = environment.hardware()
    monkeypatch.setattr(environment, "hardware", lambda: {**here, "cpu": "another"})
    start(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_out_of_memory_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    original = Harness._sample

    def sample(self, i, **kwargs):
        if i == 0 and len(self.prompt.visual_mask) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, i, **kwargs)

    monkeypatch.setattr(Harness, "_sample", sample)
    start(tmp_path, QUICK + " --batch-size 1,2")
    first, second = sorted(read_runs(tmp_path), key=lambda run: run.config["batch_size"])
    assert [r.get("failed") for r in first.metrics["rows"]] == [None, None]
    full, pruned = second.metrics["rows"]
    assert full["failed"] == "out of memory" and "prefill_ms" not in full
    assert pruned["prefill_ms"]["median"] > 0 and pruned["prefill_ratio"] is None and pruned["overhead"] is not None
    assert latency_tables(second)[0].texts[0][:3] == ["none", "full", "out of memory"]


def test_other_errors_are_not_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Harness, "forward", lambda self: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        start(tmp_path)


def test_a_shape_that_does_not_fit_stops_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: memory.GIB)
    monkeypatch.setattr(networks, "network", lambda *a: pytest.fail("made a model"))
    with pytest.raises(SystemExit) as stop:
        start(tmp_path / "new", QUICK.replace("llama-64x4 --prompt 5+40+15", "llama-64x4,llava-1.5-7b"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "llava-1.5-7b at batch 1 in float32 needs" in error and "missing" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--shape llama-64", "write llama-<hidden>x<layers>"),
        ("--shape llava-2", "no shapes for model 'llava-2'"),
        ("--prompt 5+40", "Use for example 35+576+25"),
        ("--prompt 5+x+3", "integers separated by '+'"),
        ("--prompt 5+40+1", "two or more must follow"),
        ("--shape mini --prompt 5+40+15", "a picture of this model has 576"),
        ("--methods sparsvlm", "unknown method"),
        ("--methods visionzip", "acts in the vision tower"),
        ("sparsevlm:16:ratrs=all", "no option 'ratrs'"),
        ("sparsevlm:16:raters", "method:budget[:option=value...]"),
        ("--batch-size 0", "batch_size=0"),
        ("--repeats 0", "at least 1"),
        ("--device cuda:99", "no device"),
        ("--attention flash_attention_2", "not installed"),
        ("--dtype auto", "needs a checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path / "new", f"{QUICK} {text}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_options_of_shapes_need_a_shape(tmp_path, capsys):
    for text in ("--prompt 5+40+15", "--attention eager", "--methods all"):
        with pytest.raises(SystemExit) as stop:
            start(tmp_path, text)
        assert stop.value.code == 2 and "need --shape" in capsys.readouterr().err


def test_all_methods_are_those_that_the_model_can_run(capsys, monkeypatch, tmp_path):
    planned = []
    monkeypatch.setattr(latency, "time_shapes", lambda results, plans, *_, **__: planned.extend(plans) or [])
    start(tmp_path, QUICK.replace("--methods sparsevlm", "--methods all"))
    names = {name for plan in planned for name, _, _ in plan.settings}
    assert {"sparsevlm", "sparsevlm_rank", "fastv", "random", "pyramiddrop"} <= names
    assert not names & {"none", "tome", "visionzip", "anchorprune", "cdpruner"}
    assert "skipping tome 16 for llama-64x4" in capsys.readouterr().err
    planned.clear()
    start(tmp_path, "--shape llava-1.5-7b,video-llava-7b --methods all")
    assert len(planned) == 2
    for plan in planned:
        assert {"tome", "visionzip", "sparsevlm"} <= {name for name, _, _ in plan.settings}
