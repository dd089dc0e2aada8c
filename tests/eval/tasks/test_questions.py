"""Questions as their authors put them, where the shipped recordings have no such row."""

import pytest

from eval.tasks import questions

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("blanks", [" ", "  ", ""])
def test_mme_ends_without_a_blank(blanks):
    doc = {"question": f" Is it so?{blanks}Please answer yes or no. "}
    assert questions.mme(doc) == "Is it so?" + SHORT
    assert questions.mme({"question": "Is it so?"}) == "Is it so?" + SHORT
    inside = "Does the sign say 'Please answer yes or no.'?"
    assert questions.mme({"question": f"{inside} Please answer yes or no."}) == inside + SHORT


def test_scienceqa_is_stripped_before_what_to_answer_with():
    """LLaVA's script strips the question file's text and then adds the sentence."""
    doc = {"hint": "", "question": " Which? ", "choices": ["a ", " b "]}
    expected = "Which? \nA. a \nB.  b\nAnswer with the option's letter from the given choices directly."
    assert questions.scienceqa(doc) == expected
    assert questions.scienceqa({**doc, "hint": "Look."}) == "Context: Look.\n " + expected


def test_tasks_that_the_authors_do_not_ask_stay_as_they_are():
    assert questions.as_the_authors("nextqa") == {} and questions.as_the_authors("") == {}
