"""A fixed handful of random cases, and the cases that the fuzzer has found wrong before."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fuzz.__main__ import main, run_chunk
from tests.fuzz.case import Case, Shape
from tests.fuzz.compare import check

FOUR = Shape(grid=4)
FOUND = {
    "a picture after a turn of text": Case(
        FOUR, options={"layers": (0, 2), "keep": (6, 3)}, rows=((5,), (3,)), turn=(2, "I", 2), mode="manual"
    ),
    "more stages in the second turn": Case(
        FOUR, method="pyramiddrop", options={"budget": 5}, rows=((5,), (2, "I", 3)), turn=(2, "I", 2)
    ),
    "vision methods and new ids of a second turn": Case(
        FOUR, method="fastervlm", options={"budget": 4}, rows=((2, "I", 3), (1, "I", 2, "I", 4)), turn=(2, "I", 2)
    ),
    "the same by hand": Case(
        FOUR, method="divprune", options={"budget": 4}, rows=((2, "I", 3), (6,)), turn=(2, "I", 2), mode="manual"
    ),
    "candidates behind a prompt that ends with a picture": Case(
        Shape(grid=2), method="vispruner", options={"budget": 1}, rows=(("I",),), mode="assisted", steps=2
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_before(name):
    assert check(FOUND[name]) == "exact"


def test_a_prompt_that_would_lose_every_token_is_refused():
    case = Case(Shape(kind="video_llava", grid=2), method="aim", options={"budget": 1}, rows=(("I",), (1, "I")))
    assert "a prompt of nothing else" in check(case)


def test_random_cases():
    tally = Counter()
    found = run_chunk(0, 60, tally)
    assert found is None, found
    assert tally["exact"] > 40


def test_command_line(tmp_path, capsys, monkeypatch):
    options = ["--cases", "6", "--out", str(tmp_path)]
    assert main(options) == 0
    assert "6/6 cases" in capsys.readouterr().out
    assert main([*options, "--resume"]) == 0  # nothing left to do
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("tests.fuzz.compare.Comparison.close", lambda self, exact: -1.0)  # nothing is equal
    assert main(["--cases", "20", "--out", str(tmp_path), "--seed", "1"]) == 1
    script = capsys.readouterr().err.split("\n\n", 1)[1]
    with pytest.raises(AssertionError, match="logits differ"):
        exec(script, {})
