"""The paper's tables: our runs get into their cells and nowhere else, and what was not run says so."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from statistics import fmean, median

import pytest
from hydra import compose, initialize_config_dir

from eval.runs.configs import CONFIGS
from eval.runs.reader import BadRun, read_runs
from eval.tasks import TASKS
from scripts import make_tables
from scripts.published import look_up
from scripts.tables import formats as tables
from scripts.tables.benchmarks import PAPER_SETTINGS, PAPER_TASKS
from scripts.tables.paper import EDITIONS, paper_table
from tests.scripts import folders

ICML, V1, VIDEO, VIDEO_V1, QWEN = EDITIONS
# value of a run's metrics -> what the ICML table shows
SCORES = {
    "gqa": ({"exact_match": 0.6}, "60.0"),
    "mmbench": ({"circular_accuracy": 64.0}, "64.0"),
    "mme": ({"mme_total": 1800.4}, "1800"),
    "pope": ({"pope_f1_mean": 85.0}, "85.0"),
    "scienceqa": ({"exact_match": 0.7}, "70.0"),
    "seedbench": ({"seed_all": 0.66}, "66.0"),
    "textvqa": ({"exact_match": 0.58}, "58.0"),
    "mmvet": ({"gpt_eval_score": 0.31}, "31.0"),
}


def rows(edition, results, parts=("ours",)):
    """(method, tokens) -> {column: texts of the parts}."""
    found = paper_table(edition, read_runs(results) if results else [])
    return {
        (row[0][0].text, row[1][0].text): {
            column: [part.text for part in cell if part.label in parts]
            for column, cell in zip(found.columns[2:], row[2:], strict=True)
        }
        for row in found.rows
    }


@pytest.mark.parametrize("edition", EDITIONS, ids=lambda e: e.name)
def test_without_runs_every_cell_of_ours_says_so_and_the_papers_are_there(edition):
    ours, paper = rows(edition, None), rows(edition, None, ("paper",))
    assert {text for row in ours.values() for cell in row.values() for text in cell} == {"not run"}
    settings = [("none", "full"), *((m, str(b)) for b in edition.budgets for m in edition.methods)]
    assert [key for key in ours if key[0] in (*edition.methods, "none")] == settings
    published = look_up(*edition.published, model=edition.source_model or edition.model)
    for method, budget in settings:
        of = published[
            (published["method"] == method) & (published["tokens"] == budget.replace("full", of_full(edition)))
        ]
        for benchmark in edition.benchmarks:
            (value,) = of[(of["benchmark"] == benchmark.task) & (of["metric"] == benchmark.published)]["value"]
            assert paper[method, budget][benchmark.label] == [value]


def of_full(edition):
    return {"llava_1_5_7b": "576", "qwen2_vl_7b": "dynamic"}.get(edition.model, "2048")


@pytest.mark.parametrize("edition", EDITIONS, ids=lambda e: e.name)
def test_the_caption_has_the_command_that_fills_the_table(edition):
    caption = paper_table(edition, []).caption
    command = re.search(r"`\.venv/bin/python -m eval\.run -m ([^`]*)`", caption)[1].split()
    given = dict(argument.split("=") for argument in command)
    assert given.pop("task").split(",") == list(dict.fromkeys(b.task for b in edition.benchmarks))
    assert given.pop("budget").split(",") == [str(b) for b in edition.budgets]
    methods = given.pop("method").split(",")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for method in methods:
            config = compose("config", [f"method={method}", *(f"{k}={v}" for k, v in given.items())])
    assert methods == ["none", *edition.methods] and config["model"]["name"] == edition.model
    assert config["limit"] == edition.limit
    if edition is QWEN:
        assert config["model"]["min_pixels"] == 1280 * 28 * 28 and edition.protocol in caption
        assert {k: config["model"][k] for k in PAPER_SETTINGS[edition.model]} == PAPER_SETTINGS[edition.model]
        return
    picture = edition.model == "llava_1_5_7b"
    assert config["model"]["prompt"] == ("vicuna_v1" if picture else "llava_v1")
    assert config["model"]["image_aspect_ratio"] == ("pad" if picture else "crop")


def test_a_run_fills_its_cell_and_no_other(tmp_path):
    for task, (metrics, _) in SCORES.items():
        folders.benchmark_run(tmp_path, task, metrics, "sparsevlm", 128)
    found = rows(ICML, tmp_path)
    filled = found.pop(("sparsevlm", "128"))
    shown = {b.task: filled[b.ours] for b in ICML.benchmarks}
    assert shown == {task: [text] for task, (_, text) in SCORES.items()}
    assert filled["average % (ours)"] == ["not run"]  # no unpruned run
    assert {text for row in found.values() for cell in row.values() for text in cell} == {"not run"}
    assert rows(V1, tmp_path)["sparsevlm", "128"]["GQA"] == ["60.0"]
    part = paper_table(ICML, read_runs(tmp_path)).rows[list(rows(ICML, tmp_path)).index(("sparsevlm", "128"))][2][0]
    assert part.runs == ("gqa__llava_1_5_7b__sparsevlm__128__7b",)


def test_numbers_that_measure_different_things_share_no_cell(tmp_path):
    """Other questions or another rule: ours is a column of its own, and so are our averages."""
    for edition in EDITIONS:
        for benchmark in edition.benchmarks:
            published = rows(edition, None, ("ours", "paper", "rerun"))["none", "full"]
            if benchmark.apart:
                assert "not run" not in published[benchmark.label] and published[benchmark.apart] == ["not run"]
                assert benchmark.apart in paper_table(edition, []).caption
            else:
                assert published[benchmark.label][0] == "not run"
    apart = {b.task for edition in EDITIONS for b in edition.benchmarks if b.apart}
    assert apart == {"mmbench", "pope", "vqav2", "textvqa"}  # the last one in the table of Qwen2-VL only
    folders.benchmark_run(tmp_path, "pope", {"pope_f1_mean": 85.0})
    found = rows(ICML, tmp_path, ("ours", "paper"))["none", "full"]
    assert found["POPE"] == ["85.9"] and found["POPE (9,000)"] == ["85.0"]


def test_another_judge_is_named_in_the_cell(tmp_path):
    folder = folders.benchmark_run(tmp_path, "mmvet", {"gpt_eval_score": 0.31})
    for judge, text in (("gpt-4-0613", "31.0"), ("another", "31.0 (judge: another)")):
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["benchmark"] = {
            **(metrics.get("benchmark") or {}),
            "judge": {"model": judge, "url": "u", "versions": []},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        assert rows(ICML, tmp_path)["none", "full"]["MM-Vet"] == [text]


def test_averages_by_both_rules(tmp_path):
    """Ratios to our own unpruned runs; one that asked fewer questions is shown and does not count."""
    ratios = []
    for i, (task, (metrics, _)) in enumerate(SCORES.items()):
        ratio = 0.8 + 0.02 * i**2
        folders.benchmark_run(tmp_path, task, metrics)
        folders.benchmark_run(tmp_path, task, {k: ratio * v for k, v in metrics.items()}, "fastv", 64)
        ratios.append(100 * ratio)
    found = rows(ICML, tmp_path)["fastv", "64"]
    assert found["average % (ours)"] == [f"{fmean(ratios):.1f}"]
    assert found["median % (ours)"] == [f"{median(ratios):.1f}"]
    shutil.rmtree(tmp_path / "runs" / "mmvet__llava_1_5_7b__fastv__64__7b")
    folders.benchmark_run(tmp_path, "mmvet", {"gpt_eval_score": 0.5}, "fastv", 64, limit=3, digest="first")
    found = rows(ICML, tmp_path)["fastv", "64"]
    assert found["MM-Vet"] == ["50.0 (n=3)"] and found["average % (ours)"] == [f"{fmean(ratios[:7]):.1f} (7 of 8)"]
    command = paper_table(ICML, read_runs(tmp_path)).caption.split("task=")[1]
    assert "gqa" in command  # other rows still lack it


def test_averages_of_the_papers_own_scores():
    """The printed average stands as printed; the median is computed, and MM-Vet cannot lift it."""
    found = rows(ICML, None, ("paper",))["sparsevlm", "192"]
    assert found["average %"] == ["99.1†"] and found["median %"] == ["99.0"]
    rerun = rows(ICML, None, ("rerun",))["sparsevlm", "192"]
    assert rerun["average %"] == ["98.1 (7 of 8)"] and rerun["MM-Vet"] == ["–"]
    assert rows(ICML, None, ("rerun",))["divprune", "64"]["GQA"] == ["57.1"]


def test_a_longer_run_counts_before_a_shorter_one(tmp_path):
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.5}, limit=2, n=2, digest="two")
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.6}, limit=3, n=3, digest="three")
    assert rows(ICML, tmp_path)["none", "full"]["GQA"] == ["60.0 (n=3)"]
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.7}, digest="all")
    assert rows(ICML, tmp_path)["none", "full"]["GQA"] == ["70.0"]


def test_the_video_table_counts_the_papers_first_thousand(tmp_path):
    video = {"name": "video_llava_7b", "pretrained": "video-llava-7b", "prompt": "llava_v1",
             "image_aspect_ratio": "crop"}  # fmt: skip
    scores = {"gpt_accuracy": 0.7, "gpt_score": 3.456}
    folders.benchmark_run(tmp_path, "msvd", scores, model=video, limit=1000, n=1000)
    assert rows(VIDEO, tmp_path)["none", "full"]["MSVD accuracy"] == ["70.0"]
    assert rows(VIDEO, tmp_path)["none", "full"]["MSVD score"] == ["3.46"]
    assert rows(VIDEO_V1, tmp_path)["none", "full"]["MSVD accuracy"] == ["70.0 (n=1000)"]
    assert rows(ICML, tmp_path)["none", "full"]["GQA"] == ["not run"]


def test_other_methods_and_budgets_get_rows_of_their_own(tmp_path):
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.6}, "vispruner", 64)
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.55}, "sparsevlm", 64, raters="all", digest="b")
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.5}, "vispruner", 32)
    found = rows(ICML, tmp_path)
    assert found["vispruner", "64"]["GQA"] == ["60.0"] and found["vispruner", "32"]["GQA"] == ["50.0"]
    assert found["sparsevlm (raters=all)", "64"]["GQA"] == ["55.0"] and found["sparsevlm", "64"]["GQA"] == ["not run"]


def test_numbers_of_the_embedded_model_never_get_in(tmp_path):
    folders.accuracy_run(tmp_path)
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.9}, model={"name": "mini", "pretrained": "mini"})
    assert rows(ICML, tmp_path)["none", "full"]["GQA"] == ["not run"]


@pytest.mark.parametrize("changes", [{"model": {"pretrained": "mini"}}, {"decode_gmacs": 0.006}], ids=str)
def test_a_run_that_calls_other_weights_7b_is_refused(tmp_path, changes):
    bad = folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.9}, **changes)
    for build in (lambda: paper_table(ICML, read_runs(tmp_path)), lambda: make_tables.make_tables(tmp_path)):
        with pytest.raises(BadRun, match="its weights are") as error:
            build()
        assert str(bad) in str(error.value)
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    "changes, task, metrics",
    [
        ({"model": {"prompt": "hub"}}, "gqa", {"exact_match": 0.9}),
        ({"model": {"image_aspect_ratio": "crop"}}, "gqa", {"exact_match": 0.9}),
        ({"task_options": {"ocr": False}}, "textvqa", {"exact_match": 0.9}),
        ({"task_options": {"options": {"prompt": "lmms_eval"}}}, "mmbench", {"circular_accuracy": 90.0}),
    ],
    ids=str,
)
def test_other_settings_than_the_papers_stay_out_and_are_counted(tmp_path, changes, task, metrics):
    folders.benchmark_run(tmp_path, task, metrics, **changes)
    shown = [text for cell in rows(ICML, tmp_path)["none", "full"].values() for text in cell]
    assert set(shown) == {"not run"}
    assert "1 runs with another prompt" in paper_table(ICML, read_runs(tmp_path)).caption


def test_two_runs_for_one_cell_are_refused(tmp_path):
    one = folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.9}, digest="one")
    two = folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.8}, digest="two", model={"dtype": "bfloat16"})
    with pytest.raises(BadRun, match="move one away") as error:
        paper_table(ICML, read_runs(tmp_path))
    assert str(one) in str(error.value) and str(two) in str(error.value)


def test_a_run_without_the_papers_metric_is_refused(tmp_path):
    folders.benchmark_run(tmp_path, "mme", {"something": 1.0})
    with pytest.raises(BadRun, match="has no mme_total or .*; it has something"):
        paper_table(ICML, read_runs(tmp_path))


@pytest.mark.parametrize("name", ["method", "model", "budget", "task"])
def test_an_edited_run_does_not_move_to_another_cell(tmp_path, name):
    folder = folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.6}, "fastv", 64)
    path = folder / "metrics.json"
    new = {"method": '"sparsevlm"', "model": '"llava_1_5_13b"', "budget": "128", "task": '"pope"'}[name]
    path.write_text(re.sub(rf'"{name}": ("[^"]*"|\d+)', f'"{name}": {new}', path.read_text(), count=1))
    with pytest.raises(BadRun, match="belongs to"):
        read_runs(tmp_path)


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    folder = folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.6}, "sparsevlm", 64)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("raters: paper", "raters: all"))
    with pytest.raises(BadRun, match="config.yaml and metrics.json name different"):
        read_runs(tmp_path)


def test_csv_has_a_column_per_source_and_markdown_all_in_a_cell(tmp_path):
    folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.6}, "fastv", 64)
    table = paper_table(ICML, read_runs(tmp_path))
    lines = list(csv.DictReader(tables.csv(table).splitlines()))
    (row,) = [r for r in lines if (r["method"], r["tokens"]) == ("fastv", "64")]
    assert [row[f"GQA {kind}"] for kind in ("ours", "paper", "rerun")] == ["60.0", "46.1", "46.4"]
    assert r"| fastv | 64 | 60.0 \| 46.1 \| 46.4 |" in tables.markdown(table)
    latex = tables.latex(table)
    assert r"fastv & 64 & 60.0 \textbar{} 46.1 \textbar{} 46.4 &" in latex and r"99.1\textdagger{}" in latex


def test_one_table_alone(tmp_path, capsys):
    folders.accuracy_run(tmp_path)
    make_tables.main(["--results", str(tmp_path), "--only", "table1_icml,recycling"])
    assert {p.stem for p in (tmp_path / "tables").iterdir()} == {"table1_icml", "recycling_paper"}
    make_tables.main(["--results", str(tmp_path), "--list"])
    assert "efficiency_llava_1_5_7b" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no table 'tabel1'; there are table1_icml"):
        make_tables.main(["--results", str(tmp_path), "--only", "tabel1"])


def test_every_table_is_sound_latex(tmp_path):
    """Braces and environments pair up, each row has as many cells as columns, nothing unescaped is left."""
    folders.reproduce(tmp_path, 24)
    make_tables.make_tables(tmp_path)
    for path in (tmp_path / "tables").glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path.name
        bare = re.sub(r"\\[\\{}%&$#_]", "", text.replace(r"\\" + "\n", "\n"))
        assert bare.count("{") == bare.count("}") and "_" not in bare and "#" not in bare and "$" not in bare
        begun, ended = (re.findall(rf"\\{w}\{{(\w+\*?)\}}", text) for w in ("begin", "end"))
        assert begun == ended[::-1] == ["table*", "tabular"]
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        lines = [line for line in text.splitlines() if line.endswith(r" \\")]
        assert len(lines) > 1 and all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex: apt install texlive-latex-recommended")
def test_every_table_compiles(tmp_path):
    folders.reproduce(tmp_path, 24)
    make_tables.make_tables(tmp_path)
    body = "".join(rf"\input{{tables/{p.stem}}}" for p in sorted((tmp_path / "tables").glob("*.tex")))
    (tmp_path / "all.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}" + body + r"\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "all.pdf").is_file(), done.stdout[-2000:]
    assert "Overfull" not in done.stdout


@pytest.mark.parametrize(
    "benchmark", {b.task: b for e in EDITIONS for b in e.benchmarks if b.published == "score"}.values()
)
def test_the_metrics_are_those_that_the_tasks_name_for_the_papers(benchmark):
    task = TASKS[benchmark.task]
    headline, scale = next(iter(task.metrics.items()))
    assert benchmark.metrics[0] == {headline: 100 if scale == "fraction" else 1}
    wanted = PAPER_TASKS.get(benchmark.task, {})
    assert {name: task.config[name] for name in wanted} == wanted


def test_a_run_that_left_questions_out_says_so_and_stays_out_of_averages(tmp_path):
    folder = folders.benchmark_run(tmp_path, "gqa", {"exact_match": 0.6})
    assert rows(ICML, tmp_path)["none", "full"]["GQA"] == ["60.0"]
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"excluded": 2}))
    assert rows(ICML, tmp_path)["none", "full"]["GQA"] == ["60.0 (n=3)"]


def unjudged(results: Path, method: str, budget, metrics: dict, judge: dict) -> None:
    """A run of MM-Vet whose answers no language model scored."""
    folder = folders.benchmark_run(results, "mmvet", {"exact_match": 0.2}, method, budget)
    path = folder / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **metrics, "benchmark": {"judge": judge}}))


@pytest.mark.parametrize(
    ("metrics", "judge"),
    [
        ({"not_scored": {"gpt_eval_score": "the judge died"}}, {"model": "gpt", "url": "http://x", "versions": []}),
        ({}, {"model": "exact_match", "note": "no language model judged"}),  # as an earlier version left it
    ],
)
def test_what_nobody_judged_says_so_and_every_other_cell_is_there(tmp_path, metrics, judge):
    for task, (scores, _) in SCORES.items():
        if task != "mmvet":
            folders.benchmark_run(tmp_path, task, scores)
    unjudged(tmp_path, "none", "full", metrics, judge)
    folders.benchmark_run(tmp_path, "mmvet", {"gpt_eval_score": 0.3}, "fastv", 192)
    found = rows(ICML, tmp_path)
    assert found["none", "full"]["MM-Vet"] == ["not judged"] and found["fastv", "192"]["MM-Vet"] == ["30.0"]
    assert [found["none", "full"][b.ours] for b in ICML.benchmarks[:-1]] == [
        [SCORES[b.task][1]] for b in ICML.benchmarks[:-1]
    ]
    assert "mmvet" in paper_table(ICML, read_runs(tmp_path)).caption


def test_a_run_that_was_not_judged_stands_beside_those_that_were(tmp_path):
    answers = [0.0, 1.0, 0.5]
    folders.benchmark_run(tmp_path, "mmvet", {"gpt_eval_score": 0.5}, each=answers)
    unjudged(tmp_path, "fastv", 192, {"not_scored": {"gpt_eval_score": "died"}}, {"model": "gpt", "url": "http://x"})
    (table,) = [t for t in make_tables.build_tables(read_runs(tmp_path)) if t.name.startswith("mmvet__")][:1]
    assert [row[4] for row in table.texts if row[1] == "192"] == ["not judged"]
    assert [row[4].split(" ")[0] for row in table.texts if row[1] == "full"] == ["50.0"]
    (full,) = [p for p in (tmp_path / "runs").iterdir() if "__none__" in p.name]
    content = json.loads((full / "metrics.json").read_text())
    (full / "metrics.json").write_text(json.dumps({**content, "benchmark": {"judge": {"model": "a", "url": "u"}}}))
    folders.benchmark_run(tmp_path, "mmvet", {"gpt_eval_score": 0.5}, "fastv", 64, each=answers)
    other = next(p for p in (tmp_path / "runs").iterdir() if "__64__" in p.name)
    content = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps({**content, "benchmark": {"judge": {"model": "b", "url": "u"}}}))
    with pytest.raises(BadRun, match="were judged by different models .b, a."):
        make_tables.build_tables(read_runs(tmp_path))
