"""One self-contained page of all tables and figures, in which every number links to its run or its source."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup, escape
from PIL import Image

from eval.runs.reader import Run, label
from scripts.tables.formats import NOT_RUN, Table

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_PIXELS_PER_INCH = 110  # on the screen; figures are saved at 300
_TITLES = {
    "accuracy": "Accuracy against visual tokens",
    "accuracy_gmacs": "Accuracy against multiply-adds of the prefill",
    "accuracy_latency": "Accuracy against time of the prefill",
    "recycling": "Ablation of recycling",
    "raters": "Ablation of raters",
    "layers": "Layers",
    "kept": "Kept patches and rating words",
    "latency": "Latency and its parts",
}


def write_report(path: Path, runs: Sequence[Run], tables: Sequence[Table], figures: Sequence[Path]) -> Path:
    """Write the page.

    Args:
        path: of the HTML file, written in one step.
        runs: all that were read; the tables' numbers link to them.
        figures: PNG files, in the order in which they appear.

    Raises:
        ValueError: a table names a run that is not among `runs`.
    """
    names = {run.folder.name for run in runs}
    parts = [(table, part) for table in tables for row in table.rows for cell in row for part in cell]
    for table, part in parts:
        strange = set(part.runs) - names
        if strange:
            raise ValueError(f"table {table.name} names the run {min(strange)}, which is not there")
    listed = dict.fromkeys(part.source for _, part in parts if part.source)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    page = environment.get_template("report.html.j2").render(
        runs=[_run(run) for run in runs],
        models=sorted({run.model for run in runs}),
        embedded=any(run.model.startswith("mini") for run in runs),
        newest=max(run.metrics["date"] for run in runs)[:10],
        tables=tables,
        figures=[_figure(figure) for figure in figures],
        sources={source: i for i, source in enumerate(listed, 1)},
        not_run=NOT_RUN,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _code(text: str) -> Markup:
    """`Code` in backticks as <code>."""
    parts = [escape(part) for part in text.split("`")]
    parts[1::2] = [Markup("<code>{}</code>").format(part) for part in parts[1::2]]
    return Markup("").join(parts)


def _run(run: Run) -> dict:
    """What a reader wants to know of a run."""
    m, env = run.metrics, json.loads((run.folder / "env.json").read_text(encoding="utf-8"))
    git = m["git"] or {}
    facts = {"task": m["task"], "model": m["model"]}
    if "method" in m:
        facts |= {"method": label(m["method"], m["options"]), "budget": m["budget"], "questions": m["n"]}
        facts |= {"seed": m["seed"]}
    commit = git.get("commit")
    facts |= {
        "date": m["date"],
        "command": env.get("command", "not recorded"),
        "commit": f"{commit}{' (with changes)' if git.get('dirty') else ''}" if commit else "not recorded",
        "hardware": ", ".join(f"{k} {v}" for k, v in m["hardware"].items() if v is not None),
        "versions": ", ".join(f"{k} {v}" for k, v in m["versions"].items()),
    }
    return {"name": run.folder.name, "facts": facts, "config": yaml.safe_dump(run.config, sort_keys=False)}


def _figure(path: Path) -> dict:
    kind, _, rest = path.stem.partition("__")
    with Image.open(path) as image:
        width = round(image.width * _PIXELS_PER_INCH / (image.info.get("dpi", (300, 300))[0]))
    title = _TITLES.get(kind, kind) + (f": {rest.replace('__', ', ')}" if rest else "")
    return {
        "name": path.stem, "title": title, "width": width,
        "data": base64.b64encode(path.read_bytes()).decode("ascii"),
    }  # fmt: skip
