"""Several trainings of the model in one table."""

import json
from dataclasses import asdict

import pytest

from scripts.make_separation import main
from scripts.tables.separation_report import Setting, read

SETTINGS = (
    Setting("none"),
    Setting("blind"),
    Setting("random", 64),
    Setting("sparsevlm", 64),
    Setting("sparsevlm", 64, {"raters": "all"}),
)


def _report(folder, weights: str, right: dict[str, list[bool]], **changed) -> None:
    """A folder as an earlier version left it: one JSON file per setting."""
    folder.mkdir(parents=True)
    for setting in SETTINGS:
        results = [
            {"id": i, "type": "count", "right": value, "kept": 0.25, "raters": [":"] if i else [":", "red"]}
            for i, value in enumerate(right.get(setting.label, [False] * 4))
        ]
        content = {"model": "model", "weights": weights, "task": "minivqa v0", "seed": 0, "questions": 4}
        content |= {"setting": asdict(setting), "results": results}
        (folder / f"{setting.label}.json").write_text(json.dumps(content | changed))


@pytest.fixture
def folders(tmp_path):
    _report(tmp_path / "a", "1" * 16, {"none": [True] * 4, "sparsevlm": [True, True, False, False]})
    _report(tmp_path / "b", "2" * 16, {"none": [True] * 3 + [False], "random": [True] * 4})
    return tmp_path / "a", tmp_path / "b"


def _row(text: str, heading: str, table: int, training: str) -> list[str]:
    part = text.split(f"## {heading}\n\n")[1].split("\n\n")[table]
    line = next(line for line in part.split("\n") if line.startswith(f"| {training} |"))
    return [value.strip() for value in line.replace("\\|", "/").strip("|").split("|")]


def test_each_training_is_a_line_and_differences_stay_within_it(folders, tmp_path):
    main([f"one={folders[0]}", str(folders[1]), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "seeds.md").read_text()
    assert [v.split(" ")[0] for v in _row(text, "64 tokens", 0, "one")] == ["one", "0.0", "50.0", "not", "0.0", "not"]
    assert [v.split(" ")[0] for v in _row(text, "64 tokens", 1, "one")] == ["one", "+50.0", "+50.0", "not", "not"]
    assert [v.split(" ")[0] for v in _row(text, "64 tokens", 1, "b")] == ["b", "-100.0", "+0.0", "not", "not"]
    assert _row(text, "64 tokens", 0, "one")[1].endswith("/ 25 %")
    assert "- one: Share of the questions in which a word becomes a rater: `:` 100 %, `red` 25 %." in text
    assert "| b | 2222222222222222 | 75.0 [" in text


def test_trainings_that_cannot_be_compared_are_refused(folders, tmp_path):
    _report(tmp_path / "same", "1" * 16, {})
    _report(tmp_path / "others", "3" * 16, {}, seed=7)
    _report(tmp_path / "deep" / "a", "4" * 16, {})
    for other, message in (("same", "same weights"), ("others", "same questions"), ("deep/a", "different names")):
        with pytest.raises(SystemExit, match=message):
            main([str(folders[0]), str(tmp_path / other), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="Use --out"):
        main([str(folder) for folder in folders])
    assert not (tmp_path / "out").exists()
    assert len(read(folders[0])) == len(SETTINGS)
