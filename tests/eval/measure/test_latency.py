"""The latency command: settings in, one run folder out, never twice."""

import json

import numpy as np
import pytest
import yaml

from eval.errors import UserError
from eval.measure import latency
from eval.runs.reader import read_run, read_runs
from eval.runs.writer import RunFolder
from scripts import make_tables
from tests.scripts import folders

QUICK = ["--repeats", "2", "--warmup", "0", "--decode-tokens", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three accuracy runs and the latency run made from them."""
    results = tmp_path_factory.mktemp("results")
    folders.accuracy_run(results)
    folders.accuracy_run(results, "sparsevlm", 64, raters="all")
    folders.accuracy_run(results, "sparsevlm", None, layers=(1,), keep=(50,))
    latency.main(["--results", str(results), *QUICK])
    return results


def latency_folder(results):
    (folder,) = (results / "runs").glob("latency__mini__*")
    return folder


def test_settings_and_prompt_length_come_from_the_runs(results):
    run = read_run(latency_folder(results))
    rows = run.metrics["rows"]
    assert {(r["method"], r["budget"]) for r in rows} == {
        ("none", "full"),
        ("sparsevlm", 64),
        ("sparsevlm", "explicit"),
    }
    assert {r["text_tokens"] for r in rows} == {11}
    table = make_tables.accuracy_table
    runs = read_runs(results)
    summary = make_tables.summarise(make_tables.accuracy_groups(runs)[0], runs)
    assert summary.frame["prefill_ms"].notna().all() and (table(summary) != "not run").all(axis=None)


def test_the_folder_holds_settings_machine_and_rounds(results):
    folder = latency_folder(results)
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "env.json", "metrics.json", "samples.jsonl"]
    config, metrics = (
        yaml.safe_load((folder / "config.yaml").read_text()),
        json.loads((folder / "metrics.json").read_text()),
    )
    assert config["dtype"] == "float32" and config["model"]["weights"] and len(config["settings"]) == 3
    assert metrics["task"] == "latency" and metrics["schema"] == 1 and metrics["n"] == 2
    assert metrics["hardware"]["cpu"] and metrics["versions"]["torch"] and metrics["date"]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 2
    for i, row in enumerate(metrics["rows"]):
        own = [line["prefill_ms"] for line in lines[2 * i : 2 * i + 2]]
        assert row["prefill_ms"]["median"] == pytest.approx(np.median(own))
    assert "python -m eval.measure.latency" in json.loads((folder / "env.json").read_text())["command"]


def test_the_same_command_measures_nothing_again(results, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda *a, **k: pytest.fail("measured again"))
    before = (latency_folder(results) / "metrics.json").read_bytes()
    latency.main(["--results", str(results), *QUICK])
    assert f"already there: {latency_folder(results)}" in capsys.readouterr().out
    assert (latency_folder(results) / "metrics.json").read_bytes() == before


def test_other_settings_or_another_machine_have_another_folder(results, monkeypatch):
    made = []

    def stop(*args, **kwargs):
        raise UserError("stop")

    monkeypatch.setattr(latency, "measure", stop)
    monkeypatch.setattr(RunFolder, "open", lambda self: made.append(self.path.name))
    monkeypatch.setattr(latency.sparsevlm, "load", stop)
    for extra in (["--batch-size", "2"], ["none:full"], ["--text-tokens", "12"]):
        with pytest.raises(SystemExit):
            latency.main(["--results", str(results), *QUICK, *extra])
    monkeypatch.setattr(latency.environment, "hardware", lambda: {"cpu": "another"})
    with pytest.raises(SystemExit):
        latency.main(["--results", str(results), *QUICK])
    assert len({*made, latency_folder(results).name}) == 5


def test_a_failed_measurement_leaves_no_run(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(latency, "measure", fail)
    with pytest.raises(SystemExit):
        latency.main(["none:full", "--text-tokens", "12", "--results", str(tmp_path), *QUICK])
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sparsvlm:64", "unknown method 'sparsvlm'"),
        ("sparsevlm:64:raters", "method:budget"),
        ("sparsevlm:64:ratrs=all", "no option 'ratrs'"),
        ("sparsevlm:0", "below 1"),
        ("sparsevlm:many", "neither an integer"),
    ],
)
def test_wrong_settings_are_one_line(setting, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        latency.main([setting, "--text-tokens", "12", "--results", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_nothing_to_go_by_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        latency.main(["--results", str(tmp_path)])
    assert "no runs of the model mini" in capsys.readouterr().err
