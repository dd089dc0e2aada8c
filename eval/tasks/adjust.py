"""Functions put in the place of lmms-eval's, each because of something that would be wrong or lost otherwise."""

from __future__ import annotations

from functools import lru_cache

from eval.tasks import readings
from eval.tasks.folders import datasets_cache

_MMBENCH_LETTERS = "ABCD"


def _none(value) -> bool:
    return value is None or value != value or str(value).lower() in ("nan", "none", "")


def _mmbench_prompt(doc: dict, end: str) -> str:
    lines = [] if _none(doc["hint"]) else [doc["hint"]]
    lines.append(doc["question"])
    for letter in _MMBENCH_LETTERS:
        if _none(doc.get(letter)):
            break
        lines.append(f"{letter}. {doc[letter]}")
    return "\n".join([*lines, end])


def mmbench_prompt(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question as LLaVA's `model_vqa_mmbench.py` puts it; lmms-eval adds "There are several options:" and puts the
    hint on the question's line."""
    return _mmbench_prompt(doc, "Answer with the option's letter from the given choices directly.")


def mmbench_cn_prompt(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The same with `--lang cn`."""
    return _mmbench_prompt(doc, "请直接回答选项字母。")


class GqaPictures:
    """GQA keeps its pictures in a table of their own; `find` loads it, `of` is the task's doc_to_visual."""

    def find(self, questions):
        """Load the table of pictures; the questions stay as they are."""
        from datasets import load_dataset

        self._table = load_dataset(
            "lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev", cache_dir=datasets_cache()
        )
        self._rows = {name: i for i, name in enumerate(self._table["id"])}
        lost = sorted({name for name in questions["imageId"] if name not in self._rows})
        if lost:
            raise ValueError(f"{len(lost)} pictures of GQA are missing from its table, for example {lost[0]}")
        return questions

    def of(self, doc: dict) -> list:
        return [self._table[self._rows[doc["imageId"]]]["image"].convert("RGB")]


def only_images(dataset):
    """SEED-Bench's questions about pictures."""
    return dataset.select([i for i, kind in enumerate(dataset["data_type"]) if kind == "image"])


def seedbench_picture(doc: dict) -> list:
    """The picture; of a video the middle one of the frames that the data hold. (LLaVA took the middle frame of the
    video itself, `extract_video_frames.py`; lmms-eval shows all frames, as so many pictures.)"""
    return [doc["image"][len(doc["image"]) // 2].convert("RGB")]


def gqa_results(doc: dict, results: list[str]) -> dict:
    return {"exact_match": float(readings.gqa(results[0]) == doc["answer"])}


def mme_results(doc: dict, results: list[str]) -> dict:
    return {"correct": float(readings.mme(results[0]) == doc["answer"].lower())}


def pope_results(doc: dict, results: list[str]) -> dict:
    return {"correct": float(readings.pope(results[0]) == doc["answer"].lower().strip())}


def scienceqa_results(doc: dict, results: list[str]) -> dict:
    letter = readings.scienceqa(results[0])
    return {"exact_match": float(letter == "ABCDE"[doc["answer"]])}


def seedbench_results(doc: dict, results: list[str]) -> dict:
    """1 if the answer is the letter and nothing else (convert_seed_for_submission.py)."""
    score = float(results[0] == doc["answer"])
    return {"seed_all": score, f"seed_{doc['data_type']}": score}


def vqa_results(doc: dict, results: list[str]) -> dict:
    """For TextVQA, VQAv2 and VizWiz."""
    answers = [a["answer"] if isinstance(a, dict) else a for a in doc["answers"]]
    return {"exact_match": readings.vqa_accuracy(results[0], answers)}


def conbench_results(doc: dict, results: list[str]) -> dict:
    """lmms-eval's, which raises IndexError on an empty answer to a multiple choice."""
    from lmms_eval.tasks.conbench.utils import conbench_process_results

    return conbench_process_results(doc, [results[0] if results[0].strip() else "-"])


@lru_cache(maxsize=1)
def _nextqa():
    """lmms-eval's module, with its random guess for unreadable answers replaced by no answer."""
    from eval.tasks.loading import quiet_import

    with quiet_import():
        from lmms_eval.tasks.nextqa import utils

    class NoGuess:
        @staticmethod
        def choice(options) -> str:
            return "unreadable"

    utils.random = NoGuess
    return utils


def nextqa_results(doc: dict, results: list[str]) -> dict:
    """1 or 0; an answer in which no choice is found is wrong."""
    return {"exact_match": float(_nextqa().nextqa_mc_process_results(doc, results)["exact_match"])}
