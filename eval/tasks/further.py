"""Benchmarks beside the paper's: LLaVA's other ones, whole sets and test splits, and those of later model families."""

from __future__ import annotations

from eval.tasks import scores, submissions
from eval.tasks.base import EXACT_MATCH, Task, TaskSettings
from eval.tasks.overrides import (
    JUDGE_OPTIONS,
    SHORT_PROMPT,
    aggregated_here,
    as_authors_read,
    judged,
    metric_list,
)

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_PROMPT
_LENGTH = {"max_new_tokens": 128, "do_sample": False}


def _vizwiz(settings: TaskSettings) -> dict:
    return {
        **as_authors_read("vqa")(settings),
        "doc_to_text": lambda doc, lmms_eval_specific_kwargs=None: doc["question"] + _UNANSWERABLE,
        "generation_kwargs": _LENGTH,
    }


def _vizwiz_test(settings: TaskSettings) -> dict:
    return {**_vizwiz(settings), **submissions.overrides("test")}


def _vqav2_testdev(settings: TaskSettings) -> dict:
    submissions.other_questions(settings)  # refuses a missing or damaged file before any question
    return {"generation_kwargs": _LENGTH, **submissions.overrides("testdev")}


def _mmbench_cn(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import mmbench_cn_prompt

    generation = {"max_new_tokens": 1024, "do_sample": False}
    return {
        **aggregated_here("gpt_eval_score")(settings),
        "doc_to_text": mmbench_cn_prompt,
        "generation_kwargs": generation,
    }


def _seedbench_image(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import only_images

    return {
        **as_authors_read("seedbench", "seed_image")(settings),
        "process_docs": only_images,
        "generation_kwargs": _LENGTH,
    }


def _scienceqa_full(settings: TaskSettings) -> dict:
    return {**as_authors_read("scienceqa")(settings), "generation_kwargs": {"max_new_tokens": 1024, "do_sample": False}}


FURTHER = (
    Task(
        name="vizwiz",
        title="VizWiz, validation",
        lmms=("vizwiz_vqa_val",),
        folder="vizwiz_vqa",
        size=4_319,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        overrides=_vizwiz,
        note="validation split; LLaVA's 50.0 is of the test server, for which vizwiz_test writes the file",
    ),
    Task(
        name="vizwiz_test",
        title="VizWiz, test",
        lmms=("vizwiz_vqa_test",),
        folder="vizwiz_vqa",
        size=8_000,
        metrics={"answered": "count"},
        ours=("answered",),
        overrides=_vizwiz_test,
        score=submissions.answered,
        files=submissions.vizwiz,
        note="no score: submission.json is what the test server takes (LLaVA's convert_vizwiz_for_submission.py)",
    ),
    Task(
        name="vqav2_testdev",
        title="VQAv2, test-dev",
        lmms=("vqav2_test",),
        folder="vqav2",
        size=107_394,
        metrics={"answered": "count"},
        ours=("answered",),
        options={"questions": None},  # v2_OpenEnded_mscoco_test2015_questions.json: the server asks for all of them
        overrides=_vqav2_testdev,
        score=submissions.answered,
        files=submissions.vqav2,
        note="no score: submission.json is what the test server takes (LLaVA's convert_vqav2_for_submission.py)",
    ),
    Task(
        name="llava_bench",
        title="LLaVA-Bench in the wild",
        lmms=("llava_in_the_wild",),
        folder="llava-in-the-wild",
        size=60,
        metrics={"gpt_eval_llava_all": "percent", EXACT_MATCH: "fraction"},
        ours=("gpt_eval_llava_all", EXACT_MATCH),
        options=JUDGE_OPTIONS,
        overrides=judged("llava_bench", generation_kwargs={"max_new_tokens": 1024, "do_sample": False}),
        score=scores.llava_bench,
        judge="llava_bench",
        note="in the wild; LLaVA's judge was gpt-4-0314, and an exact match with GPT-4's answer says nothing here",
    ),
    Task(
        name="mmbench_cn",
        title="MMBench, Chinese dev: scored as mmbench",
        lmms=("mmbench_cn_dev",),
        folder="mmbench",
        size=4_329,
        metrics={"circular_accuracy": "percent"},
        ours=("circular_accuracy",),
        overrides=_mmbench_cn,
        score=scores.mmbench,
        group=lambda index: int(index) % 1_000_000,
        columns=("index",),
        note="as mmbench; LLaVA's 58.3 is of mmbench_dev_cn_20231003, scored by MMBench's server",
    ),
    Task(
        name="scienceqa_full",
        title="ScienceQA, all test questions",
        lmms=("scienceqa",),
        folder="scienceqa",
        size=4_241,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        overrides=_scienceqa_full,
        note="all test questions, 2,224 of them without a picture: what LLaVA's script prints as Accuracy",
    ),
    Task(
        name="seedbench_image",
        title="SEED-Bench, questions about pictures",
        lmms=("seedbench",),
        folder="seedbench",
        size=14_233,
        metrics={"seed_image": "fraction"},
        ours=("seed_image",),
        overrides=_seedbench_image,
        score=scores.seedbench,
        note="questions about pictures only, as in LLaVA's 66.1",
    ),
    Task(
        name="chartqa",
        title="ChartQA, test: relaxed accuracy",
        lmms=("chartqa",),
        folder="chartqa",
        size=2_500,
        metrics={"relaxed_overall": "fraction"},
        overrides=lambda settings: {
            "metric_list": metric_list("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split")
        },
        note="lmms-eval's prompt and rule",
    ),
    Task(
        name="ocrbench",
        title="OCRBench",
        lmms=("ocrbench",),
        folder="ocrbench",
        size=1_000,
        metrics={"ocrbench_accuracy": "fraction"},
        ours=("ocrbench_accuracy",),
        overrides=aggregated_here("ocrbench_accuracy"),
        score=scores.dictionaries("ocrbench_accuracy"),
        note="lmms-eval's prompt and rule; its sum grows with every run of a process, so the mean is ours",
    ),
    Task(
        name="ai2d",
        title="AI2D, test",
        lmms=("ai2d",),
        folder="ai2d",
        size=3_088,
        metrics={"exact_match": "fraction"},
        note="lmms-eval's prompt and rule",
    ),
    Task(
        name="mmstar",
        title="MMStar",
        lmms=("mmstar",),
        folder="mmstar",
        size=1_500,
        metrics={"average": "fraction"},
        ours=("average",),
        overrides=aggregated_here("average"),
        score=scores.mmstar,
        note="lmms-eval's prompt and rule: the mean over the 18 kinds of question",
    ),
    Task(
        name="docvqa",
        title="DocVQA, validation",
        lmms=("docvqa_val",),
        folder="docvqa",
        size=5_349,
        metrics={"anls": "fraction"},
        note="validation split; lmms-eval's prompt and rule",
    ),
)  # fmt: skip
