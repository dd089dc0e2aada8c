"""Which room may import which, read from the source: no circle, no arrow back up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sparsevlm", "eval", "scripts")
#: Folders of eval/, lowest first: each imports from those before it, and from the modules at the top of eval/.
FLOORS = ("eval.tasks", "eval.generate", "eval.runs", "eval.measure")
ENTRIES = ("eval.__main__", "eval.fetch", "eval.run")


def modules() -> dict[str, Path]:
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of ours that a file imports, also inside functions, but not those for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


MODULES = modules()
IMPORTS = {name: set(imported(path, set(MODULES))) - {name} for name, path in MODULES.items()}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_are_found():
    assert "sparsevlm.methods" in IMPORTS["eval.runs.reader"]
    assert {"eval.runs.reader", "scripts.tables.formats"} <= IMPORTS["scripts.make_tables"]


@pytest.mark.parametrize(
    ("room", "others"), [("sparsevlm", ("eval", "scripts")), ("eval", ("scripts",))], ids=["sparsevlm", "eval"]
)
def test_no_room_imports_one_above_it(room, others):
    arrows = [(a, b) for a in IMPORTS if within(a, room) for b in IMPORTS[a] if any(within(b, o) for o in others)]
    assert arrows == []


def test_scripts_measure_nothing():
    """They read run folders and published numbers; what counts, times or generates answers lives in eval."""
    measuring = ("eval.measure", "eval.generate", "eval.run", "eval.runs.evaluate", "eval.runs.series")
    arrows = [
        (a, b) for a in IMPORTS if within(a, "scripts") for b in IMPORTS[a] if any(within(b, m) for m in measuring)
    ]
    assert arrows == []


@pytest.mark.parametrize("floor", FLOORS)
def test_each_folder_of_eval_imports_from_those_below_it(floor):
    above = (*FLOORS[FLOORS.index(floor) + 1 :], *ENTRIES)
    arrows = [(a, b) for a in IMPORTS if within(a, floor) for b in IMPORTS[a] if any(within(b, o) for o in above)]
    assert arrows == []


def test_there_are_no_circles():
    left = {name: set(targets) for name, targets in IMPORTS.items()}
    while free := [name for name, targets in left.items() if not targets]:
        for name in free:
            del left[name]
        for targets in left.values():
            targets.difference_update(free)
    assert left == {}
