"""Files for the servers that keep a test split's answers. Nothing is scored: the number is how many were answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eval.errors import UserError
from eval.tasks import readings
from eval.tasks.base import TaskSettings
from eval.tasks.scores import answer

FILE = "submission.json"


def overrides(split: str) -> dict:
    """A test split without scores."""
    listed = [{"metric": "answered", "aggregation": lambda results: None, "higher_is_better": True}]
    return {"test_split": split, "metric_list": listed, "process_results": lambda doc, results: {"answered": 1.0}}


def answered(samples: Sequence[dict]) -> dict[str, float]:
    """How many questions were answered."""
    return {"answered": float(len(samples))}


def vizwiz(samples: Sequence[dict], settings: TaskSettings) -> dict[str, str]:
    """Processed answers by picture, as LLaVA's convert_vizwiz_for_submission.py writes them."""
    rows = [{"image": f"{s['doc']['question_id']}.jpg", "answer": readings.vqa(answer(s))} for s in samples]
    return {FILE: json.dumps(rows)}


def vqav2(samples: Sequence[dict], settings: TaskSettings) -> dict[str, str]:
    """Processed answers by question, as LLaVA's convert_vqav2_for_submission.py writes them: in the order of all test
    questions, with empty answers to those of the other test splits, if `task.questions` lists them."""
    said = {int(s["doc"]["question_id"]): readings.vqa(answer(s)) for s in samples}
    numbers = other_questions(settings) or list(said)
    if unknown := said.keys() - set(numbers):
        raise ValueError(f"{settings.options['questions']} lacks {len(unknown)} of the questions, e.g. {min(unknown)}")
    return {FILE: json.dumps([{"question_id": number, "answer": said.get(number, "")} for number in numbers])}


def other_questions(settings: TaskSettings) -> list[int]:
    """Numbers of all test questions, from `task.questions`: the benchmark's
    v2_OpenEnded_mscoco_test2015_questions.json or LLaVA's llava_vqav2_mscoco_test2015.jsonl; none if it is not given.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    if not settings.options["questions"]:
        return []
    path = Path(str(settings.options["questions"])).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text)["questions"] if path.suffix == ".json" else map(json.loads, text.splitlines())
        return [int(row["question_id"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"task.questions={path} cannot be read ({type(error).__name__}: {error})") from error
