"""The page: it is complete by itself, every number leads to its run or source, and a browser shows and sorts it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.runs.reader import BadRun, read_runs
from scripts import make_paper
from scripts.figures.accuracy import plot_runs
from scripts.make_tables import build_tables
from scripts.report import write_report
from tests.scripts import folders

# What a user would do, as a script at the page's end; what it finds is read out of the page afterwards.
PROBE = """
<script>
window.addEventListener("load", () => {
  const heading = document.getElementById("minivqa__mini__n24__seed0");
  const table = heading.nextElementSibling.nextElementSibling.querySelector("table");
  const column = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent.trim());
  const button = i => table.tHead.rows[0].cells[i].querySelector("button");
  const before = column(4);
  button(4).click(); const down = column(4), mark = table.tHead.rows[0].cells[4].getAttribute("aria-sort");
  button(4).click(); const up = column(4);
  button(8).click(); const times = column(8);
  button(0).click(); const names = column(0);
  const links = [...document.querySelectorAll("a[href^='#']")].map(a => a.getAttribute("href").slice(1));
  const dangling = links.filter(id => !document.getElementById(id)).length;
  const pictures = [...document.images].map(image => image.complete && image.naturalWidth > 0);
  const loaded = performance.getEntriesByType("resource").map(r => r.name).filter(name => !name.startsWith("data:"));
  const found = document.createElement("pre"); found.id = "probe";
  found.textContent = JSON.stringify({before, down, mark, up, times, names, dangling, pictures, loaded});
  document.body.append(found);
});
</script></body>
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    results = tmp_path_factory.mktemp("report")
    folders.reproduce(results, 24)
    folders.latency_run(results, [("none", "full", {}), ("random", 192, {}), ("sparsevlm", 64, {})])
    return results


@pytest.fixture(scope="module")
def page(results):
    runs = read_runs(results)
    figures = [path for path in plot_runs(runs, results / "figures") if path.suffix == ".png"]
    return write_report(results / "report.html", runs, build_tables(runs), figures)


def test_the_page_needs_nothing_but_itself(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text) and "@import" not in text and "url(" not in text
    assert text.count("data:image/png;base64,") == 3


def test_every_number_leads_to_its_run_or_source(page, results):
    text = page.read_text(encoding="utf-8")
    for target in set(re.findall(r'href="#([^"]+)"', text)):
        assert f'id="{target}"' in text, target
    accuracy = text.split('id="minivqa__mini__n24__seed0"')[1].split("</table>")[0]
    row = next(r for r in accuracy.split("<tr>") if ">sparsevlm<" in r.split("</td>")[0] and ">64<" in r)
    assert row.count('href="#run-minivqa__mini__sparsevlm__64__sparsevlm64"') >= 6
    run = text.split('id="run-minivqa__mini__sparsevlm__64__sparsevlm64"')[1].split("</section>")[0]
    for fact in ("2026-01-02T03:04:05", "torch 2.13.0", "a CPU", "raters: paper", "not recorded"):
        assert fact in run
    paper = text.split('id="table1_icml"')[1].split("</table>")[0]
    source = re.search(r'paper</span><a href="#(source-\d+)"[^>]*>59.5</a>', paper)[1]
    assert "arxiv.org/abs/2410.04417v4" in text.split(f'id="{source}"')[1].split("</li>")[0]
    assert paper.count('class="not-run"') > 100


def test_text_is_escaped(results, tmp_path):
    shutil.copytree(results / "runs", tmp_path / "runs")
    bad = tmp_path / "runs" / "minivqa__mini__none__full__0123abcd" / "env.json"
    bad.write_text(json.dumps({**json.loads(bad.read_text()), "command": "x <script>alert(1)</script>"}))
    runs = read_runs(tmp_path)
    text = write_report(tmp_path / "report.html", runs, build_tables(runs), []).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


def test_a_number_of_a_run_that_is_not_there_is_refused(results, tmp_path):
    runs = read_runs(results)
    with pytest.raises(ValueError, match="names the run minivqa__mini__.*, which is not there"):
        write_report(tmp_path / "report.html", runs[:1], build_tables(runs), [])
    assert not list(tmp_path.iterdir())


def test_a_browser_shows_and_sorts_it_offline(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.xfail("NOT CHECKED: no Chromium here and none could be installed (make browser, as root)")
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
               "--dump-dom", probed.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert '<pre id="probe">' in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.split('<pre id="probe">')[1].split("</pre>")[0])
    values = [float(text.split()[0]) for text in found["before"]]
    assert [float(text.split()[0]) for text in found["down"]] == sorted(values, reverse=True) != values
    assert [float(text.split()[0]) for text in found["up"]] == sorted(values) and found["mark"] == "descending"
    assert [text.split()[0] for text in found["times"]] == ["100.0", "90.0", "80.0", *["not"] * 7]
    assert found["names"] == sorted(found["names"]) and set(found["names"]) > {"none", "sparsevlm (raters=all)"}
    assert found["dangling"] == 0 and found["loaded"] == [] and found["pictures"] == [True] * 3


def test_without_runs_of_ones_own_the_reference_is_shown(tmp_path):
    folders.accuracy_run(tmp_path / "reference")
    assert make_paper.source(tmp_path) == tmp_path / "reference"
    (tmp_path / "runs").mkdir()
    assert make_paper.source(tmp_path) == tmp_path / "reference"
    folders.accuracy_run(tmp_path)
    assert make_paper.source(tmp_path) == tmp_path
    assert make_paper.source(tmp_path / "reference") == tmp_path / "reference"


def test_a_broken_run_ends_everything_before_anything_is_written(tmp_path):
    broken = folders.accuracy_run(tmp_path)
    (broken / "metrics.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        make_paper.main(["--results", str(tmp_path)])
    assert str(broken) in str(stop.value.code)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    with pytest.raises(BadRun):
        make_paper.make_paper(tmp_path)


def test_one_command_makes_all_of_it(results, capsys):
    make_paper.main(["--results", str(results)])
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert all(path.is_file() for path in written) and written[-1].name == "report.html"
    kinds = {path.suffix for path in written}
    assert kinds == {".md", ".csv", ".tex", ".png", ".pdf", ".html"}
    assert {"table1_icml.md", "kept__minivqa__mini__64__raters_all.pdf"} <= {path.name for path in written}
