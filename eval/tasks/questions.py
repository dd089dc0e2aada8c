"""How the benchmarks' authors ask, where lmms-eval asks otherwise: the question's text, and how long an answer may be.

LLaVA (haotian-liu/LLaVA, c121f04; SparseVLM's copies of its scripts ask the same) and, for videos, Video-LLaVA
(PKU-YuanGroup/Video-LLaVA, 984e65b). All of them generate greedily with one beam; no string ends an answer.
"""

from __future__ import annotations

from collections.abc import Mapping

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
_MME_ENDING = "Please answer yes or no."


def mme(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question without its last sentence, and with no blank in that one's place: lmms-eval leaves one of two.

    Source: playground/data/eval/MME, llava_mme.jsonl and convert_answer_to_mme.py.
    """
    return f"{doc['question'].strip().removesuffix(_MME_ENDING).strip()}\n{SHORT}"


def scienceqa(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Context, question and options, stripped as a whole (llava/eval/model_vqa_science.py), then how to answer."""
    context = f"Context: {doc['hint']}\n" if doc["hint"] else ""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", doc["choices"], strict=False))
    return f"{context}{doc['question']}\n{options}".strip() + f"\n{LETTER}"


def bare(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question as it is in the data. lmms-eval makes ActivityNet-QA's "is it so" into "Is it so?"."""
    return doc["question"]


_TEXTS = {"mme": mme, "scienceqa": scienceqa, "activitynetqa": bare, "own:video_qa": bare}
# LLaVA's model_vqa_loader.py; its model_vqa{,_science,_mmbench}.py and Video-LLaVA's run_inference_video_qa{,_act}.py
_TOKENS = {
    **dict.fromkeys(("gqa", "pope", "mme", "textvqa", "vqav2", "seedbench", "vizwiz_vqa"), 128),
    **dict.fromkeys(("scienceqa", "mmbench", "mmvet", "llava-in-the-wild", "activitynetqa", "own:video_qa"), 1024),
}


def as_the_authors(folder: str) -> Mapping[str, object]:
    """Keys of lmms-eval's task configuration to replace.

    Args:
        folder: of the task, see `eval.tasks.base.Task`; empty for tasks that LLaVA and Video-LLaVA do not ask.
    """
    replaced: dict[str, object] = {}
    if folder in _TEXTS:
        replaced["doc_to_text"] = _TEXTS[folder]
    if folder in _TOKENS:
        replaced["generation_kwargs"] = {
            "max_new_tokens": _TOKENS[folder],
            "do_sample": False,
            "temperature": 0,
            "num_beams": 1,
            "until": [],  # lmms-eval puts a blank line where this is missing
        }
    return replaced
