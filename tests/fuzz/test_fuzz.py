"""A fixed handful of random cases, and the cases that the fuzzer has found wrong before."""

from __future__ import annotations

from collections import Counter

import pytest

import sparsevlm
from tests.fuzz.__main__ import main, run_chunk
from tests.fuzz.case import Case, Shape
from tests.fuzz.compare import check

FOUR = Shape(grid=4)
BOTH = Shape(kind="video_llava", grid=2, layers=5)
FOUND = {
    "one word after a prompt that is a picture, and a turn": Case(
        Shape(grid=1, layers=2), method="sparsevlm_rank", options={"lam": 0.3}, rows=(("I",),), turn=("I", 1), steps=1
    ),
    "a window shorter than what was dropped": Case(
        Shape(family="mistral", grid=2, layers=2, window=2), method="divprune", options={"budget": 1}, rows=(("I",),)
    ),
    "a video before an image": Case(
        BOTH, method="fastervlm", options={"budget": 9}, rows=((2, "V", 1, "I", 3), ("I", "V", 2)), alone=True
    ),
    "the same for tokens merged and dropped later": Case(
        BOTH, method="aim", options={"merge_to": 2, "first": 1, "last": 2, "start": "kept"}, rows=((2, "V", 1, "I", 3),)
    ),
    "dropped tokens that have a share in the ranking": Case(
        BOTH, method="aim", options={"merge_to": 2, "first": 1, "last": 2}, rows=((2, "V", 1, "I", 3),), mode="manual"
    ),
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


def test_pictures_smaller_than_what_they_shall_be_merged_into():
    case = Case(BOTH, method="aim", options={"merge_to": 5, "first": 1, "last": 2}, rows=((1, "V", "I", 2),))
    assert "merge_to 5 is above the 4 visual tokens of a picture (a frame) of this prompt; use at most 4" in check(case)
    with pytest.raises(ValueError, match="merge_to 700 is above the 576 visual tokens"):
        sparsevlm.build("aim", merge_to=700).plan(576, 32)


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
