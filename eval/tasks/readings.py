"""What is read out of an answer, by the rules of the authors' own scripts.

Those are LLaVA's (commit c121f04: `llava/eval` and `scripts`) and, for MME, the benchmark's `calculation.py`. They are
literal: what a rule does not know is wrong, or, in POPE, a yes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

FAILED = "FAILED"
_LETTERS = "ABCDE"


def gqa(text: str) -> str:
    """Give lower case without full stops at the end (convert_gqa_for_eval.py); what is left must be the reference."""
    return text.rstrip(".").lower()


def pope(text: str) -> str:
    """Give "no" if the first sentence has one of the words No, not, no between blanks, else "yes" (eval_pope.py)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def is_clear(text: str) -> bool:
    """Whether an answer to POPE has the word yes or no at all; one that has neither counts as a yes."""
    return bool(re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE))


def scienceqa(text: str) -> str:
    """Give a letter from A to E that is the whole answer, or is followed by a full stop and a blank; else the only
    letter after "The answer is " (and before one more character); else FAILED (eval_science_qa.py)."""
    if len(text) == 1 and text in _LETTERS:
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else FAILED


def mme(text: str) -> str:
    """Give "yes" or "no" if it is among the first four characters of the first line in lower case, else "other"
    (calculation.py). A tab, which there divides the columns of a file, makes it "other"."""
    start = text.lower().split("\n")[0][:4]
    if "\t" in text:
        return "other"
    return next((word for word in ("yes", "no") if word in start), "other")


@lru_cache(maxsize=1)
def _processor():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()  # equal to the one in LLaVA's m4c_evaluator.py


def vqa(text: str) -> str:
    """Give lower case, numbers as digits, no articles, little punctuation (m4c_evaluator.py, EvalAIAnswerProcessor)."""
    return _processor()(text)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """Compute the soft accuracy, 0 to 1: the mean, over the people asked, of min(1, how many others said it / 3), all
    answers processed by `vqa` (m4c_evaluator.py, TextVQAAccuracyEvaluator)."""
    said, given = vqa(text), [vqa(answer) for answer in answers]
    count = given.count(said)
    return fmean(min(1.0, (count - (answer == said)) / 3) for answer in given)
