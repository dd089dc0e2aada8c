"""Functions of the task minivqa that its YAML names."""

import re

VISUAL = "visual_accuracy"
#: types of question that need no picture: everybody answers them, so they dilute every difference
LANGUAGE_CONTROL = ("next",)


def doc_to_visual(doc: dict) -> list:
    """The picture, as RGB."""
    return [doc["image"].convert("RGB")]


def no_picture(doc: dict) -> list:
    """No picture: the question alone."""
    return []


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question, between the model's pre- and post-prompt."""
    kwargs = lmms_eval_specific_kwargs or {}
    return f"{kwargs.get('pre_prompt', '')}{doc['question']}{kwargs.get('post_prompt', '')}"


def normalise(text: str) -> str:
    """Lower case, no punctuation, no white space: ``" 4 2. " -> "42"``, ``"Yes" -> "yes"``."""
    return re.sub(r"[\W_]+", "", text.lower())


def process_results(doc: dict, results: list[str]) -> dict:
    """Scores one answer by exact match after :func:`normalise`.

    Returns:
        ``accuracy`` and ``accuracy_<question type>``: 1.0 or 0.0 (lmms-eval averages each over the questions that
        returned it), and ``visual_accuracy``, the same of questions that need the picture; ``question_type``: kept
        with the sample, not aggregated.
    """
    score = float(normalise(results[0]) == normalise(doc["answer"]))
    type_ = doc["question_type"]
    visual = {} if type_ in LANGUAGE_CONTROL else {VISUAL: score}
    return {**visual, "accuracy": score, f"accuracy_{type_}": score, "question_type": type_}
