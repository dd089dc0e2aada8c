"""What the tasks of this folder change about lmms-eval's, in pieces: each gives keys of its task configuration."""

from __future__ import annotations

from collections.abc import Callable

from eval.tasks.base import EXACT_MATCH, TaskSettings
from eval.tasks.questions import LETTER, SHORT

SHORT_PROMPT, LETTER_PROMPT = f"\n{SHORT}", f"\n{LETTER}"
JUDGE_OPTIONS = {
    "judge": "${oc.env:SPARSEVLM_JUDGE,null}",  # a model at judge_url, whose key is OPENAI_API_KEY; or exact_match
    "judge_url": "${oc.env:SPARSEVLM_JUDGE_URL,https://api.openai.com/v1}",  # any OpenAI-compatible endpoint
    "judge_timeout": 60,  # seconds for one reply
}


def metric_list(*names: str, aggregation="mean") -> list[dict]:
    """A metric_list: leaves out the tasks' submission files, whose names hold the time of day."""
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": True} for name in names]


def aggregated_here(*names: str) -> Callable[[TaskSettings], dict]:
    """Results that lmms-eval hands through, for `score` to aggregate."""
    return lambda settings: {"metric_list": metric_list(*names, aggregation=lambda results: None)}


def post_prompt(text: str, **more) -> dict:
    """The text behind the question, and further keyword arguments of the task's functions."""
    return {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": text, **more}}}


def as_authors_read(name: str, *metrics: str) -> Callable[[TaskSettings], dict]:
    """The authors' reading of answers: `<name>_results` of `eval.tasks.adjust`, whose metrics `score` aggregates; with
    no metrics named, it is "exact_match", of which lmms-eval takes the mean."""

    def overrides(settings: TaskSettings) -> dict:
        from eval.tasks import adjust

        listed = aggregated_here(*metrics)(settings) if metrics else {"metric_list": metric_list("exact_match")}
        return {**listed, "process_results": getattr(adjust, f"{name}_results")}

    return overrides


def judged(kind: str, **more) -> Callable[[TaskSettings], dict]:
    """Answers scored by the judge that the settings name, or by comparing strings without one.

    Args:
        kind: of `eval.tasks.judgements.JUDGEMENTS`.
        **more: further overrides.
    """

    def overrides(settings: TaskSettings) -> dict:
        from eval.tasks.judge import judge_of, scorer

        judge = judge_of(settings.options)
        scores = {"video_qa": ["gpt_accuracy", "gpt_score"], "mmvet": ["gpt_eval_score"]}.get(kind, [])
        return {
            **more,
            "process_results": scorer(kind, judge, int(settings.options.get("judge_runs", 1))),
            "metric_list": metric_list(*([] if judge is None else scores), EXACT_MATCH),
        }

    return overrides
