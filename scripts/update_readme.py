"""Copy tables of the reference results into the documents, between the marks `<!-- NAME -->` and `<!-- end -->`.

    python scripts/update_readme.py          # after results/reference has been made anew
    python scripts/update_readme.py --check  # exit status 1 if a document quotes other numbers

Nothing is computed here: rows are copied from files under `results/reference`, which the scripts named there make.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.markdown import markdown_of_records
from eval.runs.reader import LATENCY, read_runs
from scripts.tables.latency import gmacs_ratio, name_of, speedup

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"<!-- (?P<name>[a-z]+) -->\n.*?<!-- end -->\n", re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    """Write the documents anew, or only compare; one line on stderr and exit status 1 if that fails or they differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    for name in DOCUMENTS:
        path = ROOT / name
        try:
            before = path.read_text(encoding="utf-8")
            after = updated(name, before, ROOT / "results" / "reference")
        except (OSError, ValueError, StopIteration) as error:
            sys.exit(f"update_readme: {name}: {error or 'a table is missing under results/reference'}")
        if check and before != after:
            sys.exit(f"update_readme: {name} quotes other numbers than results/reference")
        if before != after:
            path.write_text(after, encoding="utf-8")


def updated(name: str, text: str, reference: Path) -> str:
    """The text of a document with its marked tables made anew.

    Args:
        name: of `DOCUMENTS`.

    Raises:
        ValueError: a mark of an unknown name, or a table without a mark.
    """
    found = [match["name"] for match in _MARK.finditer(text)]
    tables = DOCUMENTS[name]
    if sorted(found) != sorted(tables):
        raise ValueError(f"it has marks for {', '.join(found) or 'no table'}; needed: {', '.join(tables)}")

    def block(match: re.Match) -> str:
        return f"<!-- {match['name']} -->\n{tables[match['name']](reference)}\n<!-- end -->\n"

    return _MARK.sub(block, text)


def _rows(path: Path, start: int = 0) -> str:
    """The `start`-th table of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[start].rstrip("\n")


def _accuracy(reference: Path) -> str:
    return _rows(next((reference / "tables").glob("minivqa__mini__n400__*.md")))


def _short(reference: Path) -> str:
    """Four rows of the same table: the unpruned model, and SparseVLM beside its matched control at 128 tokens."""
    path = next((reference / "tables").glob("minivqa__mini__n400__*.csv"))
    with path.open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["budget"]): row for row in csv.DictReader(file)}
    names = {
        ("none", "full"): "unpruned",
        ("random_layer (match=sparsevlm)", "128"): "matched control: random tokens",
        ("sparsevlm", "128"): "SparseVLM, the paper's choice of raters",
        ("sparsevlm (raters=all)", "128"): "SparseVLM, all words of the question as raters",
    }
    columns = {
        "visual tokens": "leaving",
        "accuracy % [95 %]": "visual accuracy % [95 %]",
        "prefill GMACs": "prefill GMACs",
        "prefill time": "ratio to unpruned [quartiles]",
    }
    cells = [{"": name} | {c: rows[key][k] for c, k in columns.items()} for key, name in names.items()]
    return markdown_of_records(cells, left=1)


def _differences(reference: Path) -> str:
    return _rows(reference / "separation" / "separation.md", 1)


def _flops(reference: Path) -> str:
    found = [*(reference / "tables").glob("flops_paper.md"), *(reference / "flops").glob("flops__t118.md")]
    tables = re.findall(r"(?:^\|.*\n)+", found[0].read_text(encoding="utf-8") if found else "", re.MULTILINE)
    lines = next(table for table in tables if "the paper's formula" in table).splitlines()
    return "\n".join([*lines[:2], *(line for line in lines if line.startswith(("| none |", "| sparsevlm |")))])


def _latency(reference: Path) -> str:
    cells = []
    for run in (run for run in read_runs(reference) if run.task == LATENCY and run.model.startswith("llama-")):
        rows = run.metrics["rows"]
        full = next(row for row in rows if row["method"] == "none")
        cells += [
            {
                "random Llama, tokens": f"{run.model}, {run.config['prompt']}",
                "setting": name_of(row)[0],
                "leaving": f"{row['leaving']:.0f}",
                "speed-up of the prefill": f"{speedup(row)['median']:.2f}",
                "theoretical (MACs)": f"{gmacs_ratio(row, full):.2f}",
                "overhead": f"{row['overhead']['median']:.3f}",
            }
            for row in rows
            if row["method"] != "none"
        ]
    return markdown_of_records(cells, left=2)


DOCUMENTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"short": _short},
    "results/README.md": {"accuracy": _accuracy, "differences": _differences},
    "docs/costs.md": {"flops": _flops, "latency": _latency},
}


if __name__ == "__main__":
    main()
