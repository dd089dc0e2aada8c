"""Models that know the answers, or only wrong ones: they prove a benchmark's prompts, scoring and aggregation."""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

from collections.abc import Callable

from lmms_eval.api.model import lmms

from eval.tasks.visuals import visuals
from sparsevlm.models.media import open_image, sample_frames

LETTERS = "ABCDE"


def truth(task: str, doc: dict) -> str:
    """The right answer in the form that a model would give it."""
    if task.startswith("mvbench"):
        return f"({LETTERS[doc['candidates'].index(doc['answer'])]})"
    if task.startswith(("nextqa", "scienceqa")):
        return LETTERS[doc["answer"]]
    if task == "ai2d":
        return LETTERS[int(doc["answer"])]
    if task == "llava_in_the_wild":
        return doc["gpt_answer"]
    if task in ("vizwiz_vqa_test", "vqav2_test"):
        return "A cat."
    if task in ("ocrbench", "docvqa_val"):
        return doc["answer" if task == "ocrbench" else "answers"][0]
    if task.startswith(("textvqa", "vizwiz")):
        return max(doc["answers"], key=doc["answers"].count)
    if task.startswith("vqav2"):
        return doc["multiple_choice_answer"]
    return str(doc["answer"]).replace("<AND>", " and ").split("<OR>")[0]


def falsehood(task: str, doc: dict) -> str:
    """A wrong answer in the right form, where there is a form."""
    right = truth(task, doc)
    if right.lower() in ("yes", "no"):
        return "no" if right.lower() == "yes" else "yes"
    if right.strip("()") in LETTERS:
        wrong = "B" if right.strip("()") == "A" else "A"
        return right.replace(right.strip("()"), wrong)
    return "nothing of the kind"


class Answers(lmms):
    """Looks at every picture and video, and says what `say(task, doc)` returns.

    Attributes:
        prompts: (task, doc_id) -> the question as it was put.
        arguments: likewise the generation arguments.
    """

    is_simple = True

    def __init__(self, say: Callable[[str, dict], str] = truth) -> None:
        super().__init__()
        self.say, self.prompts, self.arguments = say, {}, {}

    def generate_until(self, requests) -> list[str]:
        out = []
        for request in requests:
            context, gen_kwargs, _, doc_id, task, split = request.args
            self.prompts[task, doc_id], self.arguments[task, doc_id] = context, gen_kwargs
            images, videos = visuals(request, self.task_dict)
            assert images or videos or task == "scienceqa", (task, doc_id)  # half of whose questions have none
            for image in images:
                open_image(image, "picture")
            for video in videos:
                assert len(sample_frames(video, 8, "video")) == 8
            out.append(self.say(task, self.task_dict[task][split][doc_id]))
        return out

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError
