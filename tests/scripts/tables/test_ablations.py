"""Ablations, separation and efficiency: what they compare, and with what."""

from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

import sparsevlm
from eval.runs.reader import accuracy_groups, read_runs
from eval.runs.stats import bootstrap_ci
from scripts.make_tables import build_tables
from scripts.tables.ablations import ablation, ablation_tables, recycling_paper
from scripts.tables.costs import efficiency_paper, efficiency_table
from scripts.tables.rank_ablation import rank_ablation
from scripts.tables.separation import separation_table
from scripts.tables.summary import summarise
from tests.scripts import folders

ROOT = Path(__file__).resolve().parents[3]
EASE = np.random.default_rng(1).random(60)
TYPES = ("count", "read", "exist")


def only_group(results):
    (group,) = accuracy_groups(read_runs(results))
    return group


@pytest.fixture(scope="module")
def ablations(tmp_path_factory):
    results = tmp_path_factory.mktemp("ablations")
    folders.accuracy_run(results, scores=EASE < 0.9)
    folders.accuracy_run(results, "sparsevlm", 64, EASE < 0.7, digest="default")
    folders.accuracy_run(results, "sparsevlm", 64, EASE < 0.6, digest="off", recycle=0.0)
    folders.accuracy_run(results, "sparsevlm", 64, EASE < 0.8, digest="all", raters="all")
    folders.accuracy_run(results, "sparsevlm", 64, EASE < 0.5, digest="both", raters="all", recycle=0.0)
    folders.accuracy_run(results, "sparsevlm", 128, EASE < 0.75, digest="alone")
    return results


def test_only_runs_that_differ_in_that_option_alone_are_compared(ablations):
    frame = ablation(only_group(ablations), "recycle")
    assert list(zip(frame["method"], frame["budget"], frame["setting"], strict=True)) == [
        ("sparsevlm", 64, "0.3 (default)"), ("sparsevlm", 64, "0.0"),
        ("sparsevlm (raters=all)", 64, "0.3 (default)"), ("sparsevlm (raters=all)", 64, "0.0"),
    ]  # fmt: skip
    default, off = frame.iloc[0], frame.iloc[1]
    paired = bootstrap_ci((EASE < 0.6).astype(float) - (EASE < 0.7))
    assert [off["difference"], off["difference_low"], off["difference_high"]] == pytest.approx(
        [100 * x for x in paired]
    )
    assert default["difference"] == 0 and off["value"] == pytest.approx(100 * (EASE < 0.6).mean())
    assert off["runs"] == ("minivqa__mini__sparsevlm__64__off", "minivqa__mini__sparsevlm__64__default")
    raters = ablation(only_group(ablations), "raters")
    assert len(raters) == 4 and set(raters["setting"]) == {"paper (default)", "all"}
    assert ablation(only_group(ablations), "layers").empty


def test_tables_exist_for_what_was_varied(ablations):
    runs = read_runs(ablations)
    tables = {t.name: t for t in ablation_tables(accuracy_groups(runs), runs)}
    name = "minivqa__mini__n60__seed0"
    assert list(tables) == ["recycling_paper", "raters_paper", f"recycling__{name}", f"raters__{name}"]
    assert "not a 7B" in tables[f"recycling__{name}"].caption
    assert tables[f"raters__{name}"].texts[0][:3] == ["sparsevlm", "64", "paper (default)"]


def test_rank_adaptive_runs_meet_the_fixed_list_of_as_many_tokens(tmp_path):
    folders.accuracy_run(tmp_path, scores=EASE < 0.9)
    adaptive = {"tokens": (120.0, 80.0), "raters": "all"}
    folders.accuracy_run(tmp_path, "sparsevlm_rank", None, EASE < 0.7, digest="a", lam=0.8, **adaptive)
    folders.accuracy_run(tmp_path, "sparsevlm_rank", None, EASE < 0.7, digest="b", lam=0.8)
    folders.accuracy_run(tmp_path, "sparsevlm", 64, EASE < 0.4, digest="c", tokens=(100, 64.0), raters="all")
    folders.accuracy_run(tmp_path, "sparsevlm", 82, EASE < 0.8, digest="d", tokens=(120, 82.0), raters="all")
    folders.accuracy_run(tmp_path, "sparsevlm", 80, EASE < 0.3, digest="e", tokens=(120, 80.0))
    table = rank_ablation(only_group(tmp_path))
    rows = {row[0]: row for row in table.texts}
    paired = (100 * x for x in bootstrap_ci((EASE < 0.7).astype(float) - (EASE < 0.8)))
    row = rows["sparsevlm_rank (raters=all, lam=0.8)"]
    assert row[1:4] == ["80.0", "79.0 to 81.0", "1.00"] and row[5] == "82.0"
    assert row[-1] == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired)
    assert rows["sparsevlm_rank (lam=0.8)"][5:] == ["not run"] * 3  # 180 tokens: no list of as many
    assert table.name in [t.name for t in build_tables(read_runs(tmp_path))]


def test_no_rank_table_without_adaptive_runs(ablations):
    assert rank_ablation(only_group(ablations)) is None


def test_the_papers_ablations_take_7b_runs_only(ablations):
    folders.benchmark_run(ablations.parent / "7b", "pope", {"pope_f1_mean": 77.7}, "sparsevlm", 64)
    folders.benchmark_run(
        ablations.parent / "7b", "pope", {"pope_f1_mean": 73.1}, "sparsevlm", 64, recycle=0.0, digest="o"
    )
    found = recycling_paper(read_runs(ablations.parent / "7b")).texts
    assert found[:2] == [["off", "64", "not run | 52.2", "73.1 | 72.8"], ["on", "64", "not run | 53.8", "77.7 | 77.5"]]
    assert all("not run" in row[3] for row in recycling_paper(read_runs(ablations)).texts)
    runs = read_runs(ablations.parent / "7b")
    folders.benchmark_run(
        ablations.parent / "7b", "pope", {"pope_f1_mean": 75.0}, "sparsevlm", 64, raters="all", digest="a"
    )
    runs = read_runs(ablations.parent / "7b")
    raters = next(t for t in ablation_tables([], runs) if t.name == "raters_paper")
    assert ["v4", "64", "all text tokens", "POPE", "+2.7 | 2.7"] in raters.texts


def test_separation_is_paired_and_by_type(tmp_path):
    wrong_at_random = np.random.default_rng(2).random(60) < 0.5
    folders.accuracy_run(tmp_path, scores=EASE < 0.9, types=TYPES)
    folders.accuracy_run(tmp_path, "random", 64, wrong_at_random, digest="r", types=TYPES)
    folders.accuracy_run(tmp_path, "sparsevlm", 64, EASE < 0.85, digest="s", types=TYPES)
    folders.accuracy_run(tmp_path, "sparsevlm", 128, EASE < 0.85, digest="t", types=TYPES)
    table = separation_table(only_group(tmp_path))
    assert list(table.columns) == ["method", "budget", "accuracy %", *TYPES, "to unpruned", "to random"]
    rows = {(r[0], r[1]): r for r in table.texts}
    ours = (EASE < 0.85).astype(float)
    mean, low, high = (100 * x for x in bootstrap_ci(ours - wrong_at_random))
    assert low > 0 and rows["sparsevlm", "64"][-1] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]*"
    assert rows["sparsevlm", "64"][3:6] == [f"{100 * ours[i::3].mean():.1f}" for i in range(3)]
    assert rows["sparsevlm", "128"][-1] == "not run"  # no random run at that budget
    assert rows["random", "64"][-1] == "0" and rows["none", "full"][-2:] == ["0", "–"]
    difference = 100 * (ours.mean() - (EASE < 0.9).mean())
    assert rows["sparsevlm", "64"][-2].startswith(f"{difference:+.1f} [")


def test_no_separation_without_controls_or_types(tmp_path):
    folders.accuracy_run(tmp_path, types=TYPES, scores=[1, 0, 1])
    assert separation_table(only_group(tmp_path)) is None
    folders.accuracy_run(tmp_path / "b")
    folders.accuracy_run(tmp_path / "b", "random", 64)
    assert separation_table(only_group(tmp_path / "b")) is None


def test_the_efficiency_of_7b_has_counts_times_and_the_papers_numbers(tmp_path):
    options = {k: v for k, v in asdict(sparsevlm.build("fastv", budget=64)).items() if k != "budget"}
    row = {"method": "fastv", "budget": 64, "text_tokens": 118, "entering": 66.0, "leaving": 64.0, "options": options}
    row["prefill_gmacs"] = 1212.0
    about = {"schema": 1, "task": "flops", "model": "llava_1_5_7b", "config_hash": "f", "n": 1, **folders.ABOUT}
    folders.write(tmp_path / "runs" / "flops__llava_1_5_7b__f", {}, {**about, "rows": [row]}, [])
    cells = {(r[0], r[1]): r for r in efficiency_paper(read_runs(tmp_path)).texts}
    assert cells["none", "full"][2:4] == ["not run", "not run"]
    fastv = cells["fastv", "64"]
    assert fastv[2:4] == ["66.0", "64.0"] and fastv[7:] == ["not run | 27.3", "1.21 | 1.29"]
    assert cells["sparsevlm", "192"][6] == "not run | 100.8†"


def test_the_efficiency_of_a_group_has_times_of_the_same_setting(tmp_path):
    folders.accuracy_run(tmp_path)
    folders.accuracy_run(tmp_path, "random", 64, gmacs=1.25)
    folders.latency_run(tmp_path, [("none", "full", {}), ("fastv", 64, {})])
    runs = read_runs(tmp_path)
    (group,) = accuracy_groups(runs)
    table = efficiency_table(summarise(group, runs))
    full, random = table.texts
    assert full[:6] == ["none", "full", "200.0", "180.0", "75.0", "100.0"] and full[8:11] == ["20.0", "100.0", "5.00"]
    assert random[6:] == ["not run"] * 5 + ["2.50"]
    assert table.rows[0][9][0].runs == ("latency__mini__beef",)


def experiment_methods(name: str):
    """The methods that `experiment=<name>` runs, built."""
    config = yaml.safe_load((ROOT / "configs" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config["limit"] <= 200 and config["experiment"]["latency"] is None
    for entry in config["experiment"]["runs"]:
        several = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in product(*several):
            given = dict(zip(entry, values, strict=True))
            options = {k.split(".")[1]: v for k, v in given.items() if k.startswith("method.")}
            options = {k: yaml.safe_load(v) if k == "layers" else v for k, v in options.items()}
            yield sparsevlm.build(given["method"], budget=given.get("budget"), **options)


@pytest.mark.parametrize(
    "name,option", [("recycling", "recycle"), ("raters", "raters"), ("text_tokens", "raters"), ("layers", "layers")]
)
def test_the_experiments_vary_one_option_at_budgets_that_can_be_kept(name, option):
    values, common = set(), None
    for method in experiment_methods(f"ablation_{name}"):
        if method.name == "sparsevlm":
            chosen = asdict(method)
            assert method.plan(576, 12).leaving == pytest.approx(chosen.pop("budget"), abs=0.5)
            values.add(str(chosen.pop(option)))
            assert common in (None, chosen)
            common = chosen
    assert len(values) > 1


def test_the_experiment_on_ranks_has_fixed_lists_of_the_same_raters():
    methods = list(experiment_methods("ablation_rank"))
    assert {m.rule for m in methods if m.name == "sparsevlm_rank"} == {"paper", "v1.0", "video"}
    assert {m.raters for m in methods if m.name != "none"} == {"all"}
    fixed = [m for m in methods if m.name == "sparsevlm"]
    assert len(fixed) == 4 and all(m.plan(576, 12).leaving == pytest.approx(m.budget, abs=0.5) for m in fixed)
