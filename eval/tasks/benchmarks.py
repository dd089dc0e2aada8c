"""The papers' benchmarks: which task of lmms-eval each is, and what is changed about it and why."""

from __future__ import annotations

from eval.tasks import scores
from eval.tasks.base import EXACT_MATCH, Task, TaskSettings
from eval.tasks.overrides import (
    JUDGE_OPTIONS,
    LETTER_PROMPT,
    SHORT_PROMPT,
    aggregated_here,
    as_authors_read,
    judged,
    post_prompt,
)

_NO_FLIP = "no video is flipped, where the authors leave a random horizontal flip on"
_JUDGED = {"gpt_accuracy": "fraction", "gpt_score": "points", EXACT_MATCH: "fraction"}
MVBENCH = (
    "action_sequence", "moving_count", "action_prediction", "episodic_reasoning", "action_antonym", "action_count",
    "scene_transition", "object_shuffle", "object_existence", "fine_grained_pose", "unexpected_action",
    "moving_direction", "state_change", "object_interaction", "character_order", "action_localization",
    "counterfactual_inference", "fine_grained_action", "moving_attribute", "egocentric_navigation",
)  # fmt: skip


def _gqa(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import GqaPictures

    pictures = GqaPictures()
    return {**as_authors_read("gqa")(settings), "process_docs": pictures.find, "doc_to_visual": pictures.of}


def _mmbench(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import mmbench_prompt

    text = {} if settings.options["prompt"] == "lmms_eval" else {"doc_to_text": mmbench_prompt}
    return {**text, **aggregated_here("gpt_eval_score")(settings)}


def _textvqa(settings: TaskSettings) -> dict:
    return {**post_prompt(SHORT_PROMPT, ocr=settings.options["ocr"]), **as_authors_read("vqa")(settings)}


def _conbench(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import conbench_results

    return {
        **aggregated_here("ConScore_D")(settings),
        "process_results": conbench_results,
        "generation_kwargs": {"max_new_tokens": 1024, "do_sample": False},
    }


def _seedbench(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import seedbench_picture

    return {**as_authors_read("seedbench", "seed_all")(settings), "doc_to_visual": seedbench_picture}


def _nextqa(settings: TaskSettings) -> dict:
    from eval.tasks.adjust import nextqa_results

    return {
        **post_prompt(LETTER_PROMPT),
        "process_results": nextqa_results,
        "generation_kwargs": {"max_new_tokens": 16, "do_sample": False},
    }


def _video_qa(name: str, title: str, size: int) -> Task:
    return Task(
        name=name,
        title=title,
        lmms=(f"{name}_qa",),
        folder="own:video_qa",
        size=size,
        metrics=_JUDGED,
        ours=tuple(_JUDGED),
        options={"data": None, **JUDGE_OPTIONS},  # data: the authors' folder, see video_qa/data.py
        overrides=judged("video_qa"),
        judge="video_qa",
        video=True,
        note="not shipped with lmms-eval; the authors' prompt (the bare question) and Video-ChatGPT's judge prompt; "
        + _NO_FLIP,
    )


BENCHMARKS = (
    Task(
        name="gqa",
        title="GQA, balanced test-dev",
        lmms=("gqa",),
        folder="gqa",
        size=12_578,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        overrides=_gqa,
        note="an answer without full stops at its end must be the reference, as in LLaVA's script and GQA's, where "
        "lmms-eval drops punctuation; pictures are looked up one by one: lmms-eval copies all of them into memory and "
        "into its cache first",
    ),
    Task(
        name="mmbench",
        title="MMBench, English dev: a question counts if every rotation of its options is answered rightly",
        lmms=("mmbench_en_dev_static",),
        folder="mmbench",
        size=4_329,
        metrics={"circular_accuracy": "percent"},
        ours=("circular_accuracy",),
        options={"prompt": ("llava", "lmms_eval")},  # lmms_eval: "There are several options:", hint on the same line
        overrides=_mmbench,
        score=scores.mmbench,
        group=lambda index: int(index) % 1_000_000,
        columns=("index",),
        note="the data set's 4,329 rows, where LLaVA asked the 4,377 of mmbench_dev_20230712; lmms-eval's rules for "
        "reading a letter out of an answer, without its random guesses for unreadable ones; LLaVA's go to a server",
    ),
    Task(
        name="mme",
        title="MME, perception and cognition",
        lmms=("mme",),
        folder="mme",
        size=2_374,
        metrics={"mme_total": "points"},
        ours=("mme_total",),
        overrides=as_authors_read("mme", "correct"),
        score=scores.mme,
        group=lambda category, question: (category, question),
        columns=("category", "question_id"),
        note="perception + cognition, as the paper's tables have it, answers read as by MME's calculation.py",
    ),
    Task(
        name="pope",
        title="POPE",
        lmms=("pope",),
        folder="pope",
        size=9_000,
        metrics={"pope_f1_mean": "percent"},
        ours=("pope_f1_mean",),
        overrides=as_authors_read("pope", "correct"),
        score=scores.pope,
        group=lambda category: category,
        columns=("category",),
        interleave=True,
        note="mean F1 of the three splits, answers read as by LLaVA's eval_pope.py; 9,000 questions, where LLaVA asked "
        "8,910 (POPE's first edition has 2,910 random ones)",
    ),
    Task(
        name="scienceqa",
        title="ScienceQA, test questions with a picture",
        lmms=("scienceqa_img",),
        folder="scienceqa",
        size=2_017,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        overrides=as_authors_read("scienceqa"),
        note="questions with a picture; LLaVA's model zoo has 66.8 where the paper's unpruned row has 69.5",
    ),
    Task(
        name="vqav2",
        title="VQAv2, validation",
        lmms=("vqav2_val",),
        folder="vqav2",
        size=214_354,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        overrides=as_authors_read("vqa"),
        note="validation split; the papers' 78.5 is of the test server, for which vqav2_testdev writes the file",
    ),
    Task(
        name="textvqa",
        title="TextVQA, validation",
        lmms=("textvqa_val",),
        folder="textvqa",
        size=5_000,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        options={"ocr": (True, False)},  # OCR tokens in the prompt
        overrides=_textvqa,
        note="with the OCR tokens in the prompt, as LLaVA's and the paper's numbers are",
    ),
    Task(
        name="conbench",
        title="ConBench, discriminative: a picture counts if its 3 questions are answered rightly",
        lmms=("ConBench",),
        folder="conbench",
        size=3_000,
        metrics={"ConScore_D": "fraction"},
        ours=("ConScore_D",),
        overrides=_conbench,
        score=scores.conbench,
        group=lambda image: image,
        columns=("image_id",),
        note="greedy, where lmms-eval samples; its end on an empty answer to a choice is a wrong answer here",
    ),
    Task(
        name="seedbench",
        title="SEED-Bench, all questions",
        lmms=("seedbench",),
        folder="seedbench",
        size=19_242,
        metrics={"seed_all": "fraction"},
        ours=("seed_all",),
        overrides=_seedbench,
        score=scores.seedbench,
        note="all questions; a video is shown by the middle one of the frames in the data, where LLaVA took the middle "
        "frame of the video. LLaVA's unpruned numbers are 58.6 (all), 66.1 (pictures); the paper's 60.3 is neither",
    ),
    Task(
        name="mmvet",
        title="MM-Vet",
        lmms=("mmvet",),
        folder="mmvet",
        size=218,
        metrics={"gpt_eval_score": "fraction", EXACT_MATCH: "fraction"},
        ours=("gpt_eval_score", EXACT_MATCH),
        options={**JUDGE_OPTIONS, "judge_runs": 5},  # how often each answer is judged, as in MM-Vet's paper
        score=scores.judge_runs,
        overrides=judged("mmvet", **post_prompt("")),
        judge="mmvet",
        note="the bare question as prompt; lmms-eval asks for reasoning first, and scores 0 where its judge fails. The "
        "judge is asked as by MM-Vet's authors, judge_runs times; the published judge is gpt-4-0613",
    ),
    _video_qa("tgif", "TGIF-QA", 25_751),
    _video_qa("msvd", "MSVD-QA", 13_157),
    _video_qa("msrvtt", "MSRVTT-QA", 72_821),
    Task(
        name="activitynet",
        title="ActivityNet-QA",
        lmms=("activitynetqa",),
        folder="activitynetqa",
        size=8_000,
        metrics=_JUDGED,
        ours=tuple(_JUDGED),
        options=JUDGE_OPTIONS,
        overrides=judged("video_qa"),
        judge="video_qa",
        video=True,
        note=f"the bare question as in the data (lower case, no question mark), as the authors ask; {_NO_FLIP}",
    ),
    Task(
        name="videomme",
        title="Video-MME without subtitles",
        lmms=("videomme",),
        folder="videomme",
        size=2_700,
        metrics={"videomme_perception_score": "percent"},
        score=scores.videomme,
        video=True,
        note="without subtitles",
    ),
    Task(
        name="nextqa",
        title="NExT-QA, multiple choice, test",
        lmms=("nextqa_mc_test",),
        folder="nextqa",
        size=8_564,
        metrics={"exact_match": "fraction"},
        ours=("exact_match",),
        overrides=_nextqa,
        video=True,
        note="multiple choice; an answer without a letter is wrong, where lmms-eval guesses at random",
    ),
    Task(
        name="mvbench",
        title="MVBench",
        lmms=tuple(f"mvbench_{sub}" for sub in MVBENCH),
        folder="mvbench",
        size=4_000,
        metrics={"mvbench_mean": "percent"},
        ours=("mvbench_mean",),
        overrides=aggregated_here("mvbench_accuracy"),
        score=scores.mvbench,
        video=True,
        note="mean over 20 sub-tasks; a limit is shared between them",
    ),
)
