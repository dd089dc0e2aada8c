"""The authors' rules for reading answers, case by case, worked out from their scripts by hand."""

import pytest

from eval.tasks import readings

CASES = {
    readings.gqa: {"Yes": "yes", "Yes.": "yes", "No..": "no", "Yes!": "yes!", "a red car": "a red car", ".": ""},
    readings.pope: {
        "yes": "yes", "No": "no", "No.": "no", "No, there is a cat.": "no", "no, it is": "no", "It is not": "no",
        "Yes. There is no dog": "yes", "NO": "yes", "Not really": "yes", "nothing": "yes", "": "yes", "no\nyes": "yes",
        "There is no dog.": "no", "no!": "yes",
    },
    readings.scienceqa: {
        "A": "A", "E": "E", "F": "FAILED", "a": "FAILED", "A.": "FAILED", "A. fern": "A", "A.fern": "FAILED",
        "(A)": "FAILED", "The answer is B.": "B", "The answer is B": "FAILED", "So. The answer is D, I think": "D",
        "The answer is A. The answer is B.": "FAILED", "the answer is A.": "FAILED", "": "FAILED", "AB": "FAILED",
        "A. The answer is B.": "A",
    },
    readings.mme: {
        "Yes": "yes", "no.": "no", "y": "other", "n": "other", "Not at all": "no", "There is none": "other",
        "": "other", "a yes": "other", "ayes": "yes", "A\nno": "other", "no\tyes": "other", "It is no": "other",
    },
    readings.vqa: {
        "McDonald's": "mcdonald 's", "3/4": "3 4", "10,000": "10000", "On the table": "on table",
        "dont walk": "don't walk", "St. Louis.": "st louis", "two": "2", "5.99": "5.99", "12:30": "12:30", "A": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("read", CASES, ids=lambda read: read.__name__)
def test_readings(read):
    assert {text: read(text) for text in CASES[read]} == CASES[read]


def test_soft_accuracy_leaves_each_person_out_once():
    """Of ten people k said it: by the definition, k of ten times with k - 1 others and 10 - k times with k."""
    for k in range(11):
        expected = (k * min(1, (k - 1) / 3) + (10 - k) * min(1, k / 3)) / 10 if k else 0
        assert readings.vqa_accuracy("Two.", ["two"] * k + ["six"] * (10 - k)) == pytest.approx(expected)


def test_clear_words():
    clear = {"yes": True, "NO!": True, "It is not": True, "": False, "nothing": False, "Yesterday": False}
    assert {text: readings.is_clear(text) for text in clear} == clear
