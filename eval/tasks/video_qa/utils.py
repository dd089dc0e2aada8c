"""Functions of the video tasks that their YAML names.

Under lmms-eval's own command line the judge comes from the environment: SPARSEVLM_JUDGE (a model's name) with
SPARSEVLM_JUDGE_URL and OPENAI_API_KEY; without SPARSEVLM_JUDGE there is only exact match.
"""

import os

from eval.tasks.judge import judge_of, scorer


def doc_to_visual(doc: dict) -> list[str]:
    """The video's file."""
    return [doc["video"]]


def process_results(doc: dict, results: list[str]) -> dict:
    """Exact match, and the judge's scores where the environment names one."""
    options = {
        "judge": os.environ.get("SPARSEVLM_JUDGE") or "exact_match",
        "judge_url": os.environ.get("SPARSEVLM_JUDGE_URL") or "https://api.openai.com/v1",
        "judge_timeout": 60,
    }
    return scorer("video_qa", judge_of(options))(doc, results)
