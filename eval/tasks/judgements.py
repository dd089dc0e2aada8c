"""What the benchmarks' authors ask a language model about an answer, and how they read its reply.

A judgement is a list of requests (the arguments of a chat completion, without the model): the first one, and those that
follow while a reply cannot be read. Where the authors give no temperature or length, none is sent.

* Questions about videos: Video-LLaVA's `eval_video_qa.py` (984e65b), which is Video-ChatGPT's.
* MM-Vet: `mm-vet_evaluator.py` of yuweihao/MM-Vet (acde843).
* LLaVA-Bench (in the wild): LLaVA's `eval_gpt_review_bench.py` (c121f04); its rules are data of lmms-eval.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_AGAIN = 3  # further requests where the authors ask until a reply can be read


@dataclass(frozen=True)
class Judgement:
    """How a benchmark has an answer judged.

    Attributes:
        requests: (row of the data, answer) -> requests, see above.
        read: reply -> scores; ValueError if it cannot be read.
    """

    requests: Callable[[Mapping, str], list[dict]]
    read: Callable[[str], dict[str, float]]


def video_qa(doc: Mapping, prediction: str) -> list[dict]:
    """Whether an answer to a question about a video matches the right one, and how well."""
    system = (
        "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for "
        "question-answer pairs. Your task is to compare the predicted answer with the correct answer and determine if "
        "they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: "
        "- Focus on the meaningful match between the predicted answer and the correct answer.\n"
        "- Consider synonyms or paraphrases as valid matches.\n"
        "- Evaluate the correctness of the prediction compared to the answer."
    )
    user = (
        "Please evaluate the following video-based question-answer pair:\n\n"
        f"Question: {doc['question']}\nCorrect Answer: {doc['answer']}\nPredicted Answer: {prediction}\n\n"
        "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, with "
        "5 indicating the highest meaningful match. Please generate the response in the form of a Python dictionary "
        "string with keys 'pred' and 'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' "
        "is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python "
        "dictionary string. For example, your response should look like this: {'pred': 'yes', 'score': 4.8}."
    )
    request = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}
    return [request] * (1 + _AGAIN)


def read_video_qa(reply: str) -> dict[str, float]:
    """`gpt_accuracy`, 1.0 if the dictionary's "pred" has "yes" in it, and `gpt_score`, 0 to 5, cut to an integer.

    A dictionary among other words is read too, where the authors ask again.

    Raises:
        ValueError: there is no dictionary, or it says neither yes nor no, or no score from 0 to 5.
    """
    found = re.search(r"\{[^{}]*\}", reply)
    try:
        review = ast.literal_eval(found[0]) if found else {}
        verdict, score = str(review["pred"]).lower(), int(float(review["score"]))
    except (KeyError, TypeError, SyntaxError, ValueError) as error:
        raise ValueError(f"no verdict in {reply!r}") from error
    if not ("yes" in verdict or "no" in verdict) or not 0 <= score <= 5:
        raise ValueError(f"no verdict in {reply!r}")
    return {"gpt_accuracy": float("yes" in verdict), "gpt_score": float(score)}


_X = "What is x in the equation? | -1 <AND> -5 |"
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. |"
)
_MMVET = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    f"{_X} x = 3 | 0.0\n{_X} x = -1 | 0.5\n{_X} x = -5 | 0.5\n{_X} x = -5 or 5 | 0.5\n{_X} x = -1 or x = -5 | 1.0\n"
    f"{_MEME} The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not "
    "very icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME} The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is "
    "why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. "
    "The humor in this meme is derived from the unexpected contrast between the names of the countries and their "
    "actual physical characteristics. | 1.0\n"
)


def mmvet(doc: Mapping, prediction: str) -> list[dict]:
    """How right an answer to MM-Vet is; asked again with a hint, hotter each time, up to five times in all."""
    right = doc["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = f"{_MMVET}\n{doc['question']} | {right} | {prediction} | "
    hint = f"{text}\nPredict the correctness of the answer (digit): "
    tries = [(text, 0.0), (hint, 0.0), (hint, 0.5), (hint, 1.0), (hint, 1.5)]
    return [
        {"messages": [{"role": "user", "content": content}], "temperature": temperature, "max_tokens": 3}
        for content, temperature in tries
    ]


def read_mmvet(reply: str) -> dict[str, float]:
    """`gpt_eval_score`: the number before the first blank.

    Raises:
        ValueError: none from 0 to 1, or one that ends with its point: a judge whose tokens are shorter than GPT-4's
            was cut off by the limit of three.
    """
    first = reply.strip().split(" ")[0].strip()
    score = float(first)
    if not 0 <= score <= 1 or first.endswith("."):
        raise ValueError(f"no score in {reply!r}")
    return {"gpt_eval_score": score}


@lru_cache(maxsize=1)
def _rules() -> dict:
    import lmms_eval.tasks

    file = Path(lmms_eval.tasks.__file__).parent / "llava-in-the-wild" / "rule.json"
    return json.loads(file.read_text(encoding="utf-8"))


def llava_bench(doc: Mapping, prediction: str) -> list[dict]:
    """How good an answer is beside GPT-4's, which saw captions instead of the picture; each from 1 to 10."""
    rule = _rules()[f"llava_bench_{doc['category']}"]
    caption = doc["caption"] if isinstance(doc["caption"], str) else "\n".join(doc["caption"])
    role, answers = rule["role"], (doc["gpt_answer"], prediction)
    shown = "".join(f"[{role} {i}]\n{text}\n\n[End of {role} {i}]\n\n" for i, text in enumerate(answers, 1))
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    user = f"[Context]\n{caption}\n\n[Question]\n{doc['question']}\n\n{shown}[System]\n{rule['prompt']}\n\n"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return [{"messages": messages, "temperature": 0.2, "max_tokens": 1024}] * (1 + _AGAIN)


def read_llava_bench(reply: str) -> dict[str, float]:
    """`gpt4_rating` and `rating`, the two numbers on the first line.

    Raises:
        ValueError: it is not two numbers, or not from 0 to 10; the authors count such a reply as -1 for both.
    """
    first, second = map(float, reply.split("\n")[0].replace(",", " ").split())
    if not (0 <= first <= 10 and 0 <= second <= 10):
        raise ValueError(f"no ratings in {reply!r}")
    return {"gpt4_rating": first, "rating": second}


JUDGEMENTS = {
    "video_qa": Judgement(video_qa, read_video_qa),
    "mmvet": Judgement(mmvet, read_mmvet),
    "llava_bench": Judgement(llava_bench, read_llava_bench),
}
