"""Put the tables of the reference results into the README, between the marks `<!-- NAME -->` and `<!-- end -->`.

    python scripts/update_readme.py          # after results/reference has been made anew
    python scripts/update_readme.py --check  # exit status 1 if the README quotes other numbers

Nothing is computed here: rows are copied from files under `results/reference`, which the scripts named there make.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sparsevlm.cost.flops import markdown
from sparsevlm.cost.report import name_of

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"<!-- (?P<name>[a-z]+) -->\n.*?<!-- end -->\n", re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    """Write the README anew, or only compare; one line on stderr and exit status 1 if it cannot be or differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    path, reference = ROOT / "README.md", ROOT / "results" / "reference"
    try:
        before = path.read_text(encoding="utf-8")
        after = updated(before, reference)
    except (OSError, ValueError, StopIteration) as error:
        sys.exit(f"update_readme: {error or 'a table is missing under results/reference'}")
    if parser.parse_args(argv).check:
        sys.exit(None if before == after else "update_readme: README.md quotes other numbers than results/reference")
    path.write_text(after, encoding="utf-8")


def updated(readme: str, reference: Path) -> str:
    """The README with its marked tables made anew.

    Raises:
        ValueError: a mark of an unknown name, or a table without a mark.
    """
    found = [match["name"] for match in _MARK.finditer(readme)]
    if sorted(found) != sorted(TABLES):
        raise ValueError(f"README.md has marks for {', '.join(found) or 'no table'}; needed: {', '.join(TABLES)}")

    def block(match: re.Match) -> str:
        return f"<!-- {match['name']} -->\n{TABLES[match['name']](reference)}\n<!-- end -->\n"

    return _MARK.sub(block, readme)


def _rows(path: Path, start: int = 0) -> str:
    """The `start`-th table of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[start].rstrip("\n")


def _accuracy(reference: Path) -> str:
    return _rows(next((reference / "tables").glob("minivqa__mini__n400__*.md")))


def _differences(reference: Path) -> str:
    return _rows(reference / "separation" / "separation.md", 1)


def _flops(reference: Path) -> str:
    lines = _rows(next((reference / "flops").glob("flops__t118.md")), -2).splitlines()
    return "\n".join([*lines[:2], *(line for line in lines if line.startswith(("| none |", "| sparsevlm |")))])


def _latency(reference: Path) -> str:
    rows = json.loads((reference / "latency" / "latency.json").read_text(encoding="utf-8"))["rows"]
    cells = [
        {
            "random Llama, tokens": f"{row['shape']}, {row['prompt']}",
            "setting": name_of(row),
            "leaving": f"{row['leaving']:.0f}",
            "speed-up of the prefill": f"{row['speedup']['median']:.2f}",
            "promised by the multiply-adds": f"{row['gmacs_ratio']:.2f}",
            "overhead": f"{row['overhead']['median']:.3f}",
        }
        for row in rows
        if row["shape"].startswith("llama-") and row["method"] != "none"
    ]
    return markdown(cells, left=2)


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": _accuracy,
    "differences": _differences,
    "flops": _flops,
    "latency": _latency,
}


if __name__ == "__main__":
    main()
