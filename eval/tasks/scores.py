"""From lmms-eval's sample records to one number per question, and the metrics that lmms-eval does not aggregate.

A sample record is a dict with `doc` (its row, pictures left out), `target`, `filtered_resps` (the answer) and what the
task's `process_results` returned. Each function here replaces those results by numbers in place, keeping only what is
one number per question in the unit of the metric of the same name (so that a mean over questions, where the metric is
one, equals it), and returns the metrics that are this project's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from eval.tasks import readings

POPE_SPLITS = ("adversarial", "popular", "random")


def answer(sample: dict) -> str:
    """What the model said."""
    return str(sample["filtered_resps"][0])


def keep(samples: Iterable[dict], results: Sequence[str], number: Callable[[dict, dict], dict[str, float]]) -> None:
    """Replace lmms-eval's `results` of each sample by what `number(sample, first of its results)` gives."""
    for sample in samples:
        found = [sample.pop(name) for name in results if name in sample]
        sample.update(number(sample, found[0]))


def mme(samples: Sequence[dict]) -> dict[str, float]:
    """Total: perception + cognition, each the sum over categories of accuracy and accuracy of whole pairs, in percent;
    and each category's points.

    A category without questions (under a limit) adds nothing; the full set has 10 + 4. A pair of which one question was
    excluded counts in neither accuracy.
    """
    from lmms_eval.tasks.mme.utils import eval_type_dict

    names = ("mme_perception_score", "mme_cognition_score")
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for s in samples:
        pairs[s["doc"]["category"]][s["doc"]["question_id"]].append(s["correct"])
    sums, each = dict.fromkeys(names, 0.0), {}
    for category, found in sorted(pairs.items()):
        if whole := [pair for pair in found.values() if len(pair) == 2]:
            kind = names[0] if category in eval_type_dict["Perception"] else names[1]
            points = 100 * fmean(fmean(pair) for pair in whole) + 100 * fmean(all(pair) for pair in whole)
            sums[kind] += points
            each[f"mme_{category}"] = points
    return {"mme_total": sum(sums.values()), **sums, **each, "correct": fmean(s["correct"] for s in samples)}


def yes_no_metrics(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of "yes", in percent, of (said, true), as in LLaVA's eval_pope.py; what
    is divided by 0 there is 0 here."""
    hits = sum(said == true == "yes" for said, true in pairs)
    said_yes, true_yes = (sum(pair[i] == "yes" for pair in pairs) for i in (0, 1))
    found = {
        "accuracy": sum(said == true for said, true in pairs) / len(pairs),
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / true_yes if true_yes else 0.0,
        "f1": 2 * hits / (said_yes + true_yes) if hits else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }
    return {name: 100 * value for name, value in found.items()}


def pope(samples: Sequence[dict]) -> dict[str, float]:
    """Mean of the F1 of the three splits, each split's metrics, all in percent, and how many answers have no clear
    word in them. Those count as "yes", as everything does that is no clear "no".

    Raises:
        ValueError: a split that is not POPE's.
    """
    by_split = defaultdict(list)
    for s in samples:
        by_split[s["doc"]["category"]].append((readings.pope(answer(s)), s["doc"]["answer"].lower().strip()))
    if odd := set(by_split) - set(POPE_SPLITS):
        raise ValueError(f"POPE has the splits {', '.join(POPE_SPLITS)}; the data names {', '.join(sorted(odd))}")
    each = {split: yes_no_metrics(pairs) for split, pairs in sorted(by_split.items())}
    return {
        "pope_f1_mean": fmean(found["f1"] for found in each.values()),
        **{f"pope_{name}_{split}": value for split, found in each.items() for name, value in found.items()},
        "correct": fmean(s["correct"] for s in samples),
        "unclear_answers": float(sum(not readings.is_clear(answer(s)) for s in samples)),
    }


def mmbench(samples: Sequence[dict]) -> dict[str, float]:
    """One score per circle of rows, at its first row: 100 if every rotation was answered rightly; their mean.

    lmms-eval's rules read the letter out of an answer; where they find none, the answer is wrong.
    """
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator = MMBench_Evaluator()
    circles = defaultdict(list)
    for s in samples:
        s.pop("submission", None)
        row = s.pop("gpt_eval_score")
        row.update({letter: None for letter in "ABCDE" if row.get(letter) == "nan"})  # else "nan" is found in "banana"
        circles[int(row["index"]) % 1_000_000].append((s, row))
    for rows in circles.values():
        frame = pd.DataFrame([{**row, "prediction": str(row["prediction"])} for _, row in rows])
        right = evaluator.eval_sub_data(
            frame, dict(zip(frame["index"], frame["answer"], strict=True)), static_only=True
        )
        rows[0][0]["circular_accuracy"] = 100.0 * right
    return {"circular_accuracy": fmean(s["circular_accuracy"] for s in samples if "circular_accuracy" in s)}


def conbench(samples: Sequence[dict]) -> dict[str, float]:
    """One score per picture, at its first question: 1 if all three forms of the question were answered rightly; their
    mean. A picture of which a question was excluded does not count."""
    pictures = defaultdict(list)
    for s in samples:
        s["correct"] = float(s.pop("ConScore_D")["score"])
        pictures[s["doc"]["image_id"]].append(s)
    whole = [group for group in pictures.values() if len(group) == 3]
    for group in whole:
        group[0]["ConScore_D"] = float(all(s["correct"] for s in group))
    score = fmean(group[0]["ConScore_D"] for group in whole) if whole else 0.0
    return {"ConScore_D": score, "correct": fmean(s["correct"] for s in samples)}


def seedbench(samples: Sequence[dict]) -> dict[str, float]:
    """Accuracy over all questions, and over those about pictures and about videos."""
    names = ("seed_all", "seed_image", "seed_video")
    found = {name: [s[name] for s in samples if name in s] for name in names}
    return {name: fmean(values) for name, values in found.items() if values}


def judge_runs(samples: Sequence[dict]) -> dict[str, float]:
    """What each of several runs of the judge gave: means over questions of `<score>_run<i>`."""
    runs = sorted({name for s in samples for name in s if re.fullmatch(r".*_run\d+", name)})
    return {name: fmean(s[name] for s in samples) for name in runs}


def llava_bench(samples: Sequence[dict]) -> dict[str, float]:
    """Sum of the model's ratings over the sum of GPT-4's, in percent, of all questions and of each kind, as in LLaVA's
    summarize_gpt_review.py; nothing where no judge rated."""
    rated = defaultdict(list)
    for s in samples:
        if "rating" in s:
            for kind in ("all", s["doc"]["category"]):
                rated[kind].append((s["rating"], s["gpt4_rating"]))
    sums = {kind: [sum(values) for values in zip(*pairs, strict=True)] for kind, pairs in rated.items()}
    return {f"gpt_eval_llava_{kind}": 100 * ours / gpt4 if gpt4 else 0.0 for kind, (ours, gpt4) in sums.items()}


def dictionaries(name: str) -> Callable[[Sequence[dict]], dict[str, float]]:
    """For tasks whose results are dictionaries with a "score": the mean."""

    def score(samples: Sequence[dict]) -> dict[str, float]:
        keep(samples, (name,), lambda s, r: {name: float(r["score"])})
        return {name: fmean(s[name] for s in samples)}

    return score


def mmstar(samples: Sequence[dict]) -> dict[str, float]:
    """Mean over the kinds of question of their accuracies; a limit may leave kinds out."""
    categories = {s["doc"]["category"] for s in samples}
    keep(samples, ("average", *sorted(categories)), lambda s, r: {"correct": float(r["score"])})
    kinds = defaultdict(list)
    for s in samples:
        kinds[s["doc"]["l2_category"]].append(s["correct"])
    return {"average": fmean(map(fmean, kinds.values())), "correct": fmean(s["correct"] for s in samples)}


def videomme(samples: Sequence[dict]) -> dict[str, float]:
    """In percent, and the three lengths of video apart, which lmms-eval only logs."""
    keep(samples, ("videomme_perception_score",), lambda s, r: {"videomme_perception_score": 100.0 * r["score"]})
    by_length = defaultdict(list)
    for s in samples:
        by_length[s["doc"]["duration"]].append(s["videomme_perception_score"])
    return {f"videomme_{length}": fmean(found) for length, found in sorted(by_length.items())}


def mvbench(samples: Sequence[dict]) -> dict[str, float]:
    """Mean over the sub-tasks of their accuracies, in percent; an empty answer is a wrong one, which lmms-eval leaves
    out of the denominator."""
    keep(samples, ("mvbench_accuracy",), lambda s, r: {"correct": float(r["pred_answer"] != "" and r["score"])})
    by_task = defaultdict(list)
    for s in samples:
        by_task[s["task"]].append(100.0 * s["correct"])
    each = {name: fmean(found) for name, found in sorted(by_task.items())}
    return {"mvbench_mean": fmean(each.values()), **each, "correct": fmean(s["correct"] for s in samples)}
