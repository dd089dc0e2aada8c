"""Leaving early where the guide of `sgl` is sure of its own answer (SEE), on the embedded model.

    python -m eval.measure.early_exit                          # the shipped guide, 64 tokens, 270 questions
    python -m eval.measure.early_exit --guide self --out results/early_exit

Each question is put to the guide first. Its surety S is the mean of its confidence and its consistency (see
`sparsevlm.methods.sgl.surety`); where S is above a threshold, its answer is the answer, and the large model does not
run. Where it is not, the large model answers, pruned by the importance that the guide has found. Both answers of every
question are kept, so that any threshold can be looked at afterwards; the report has the share that leaves early and the
accuracy for some, and how well S tells right answers of the guide from wrong ones (AUROC). Answers have one or two
tokens and an end here: confidence and consistency are products of two or three probabilities.

The authors' released code computes and logs both numbers and never leaves early.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from eval.markdown import markdown_of_records
from eval.runs import environment
from eval.tasks.minivqa.dataset import VERSION, rows
from eval.tasks.minivqa.utils import normalise
from sparsevlm.methods._guides import find_guide
from sparsevlm.methods.sgl import surety
from sparsevlm.runtime.families import locate
from sparsevlm.runtime.guide import Guide, Prompts
from sparsevlm.runtime.inputs import visual_tokens

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_ANSWER = {"max_new_tokens": 4, "do_sample": False}


@dataclass
class Batch:
    """Questions of one type, so that none is padded much and all are answered in as many steps, and their inputs."""

    rows: list[dict]
    inputs: dict[str, torch.Tensor]


def batches(processor, seed: int, questions: int, size: int) -> Iterator[Batch]:
    """Yield the first `questions` of minivqa in batches of at most `size`, by type and length."""
    drawn = sorted(rows(seed, questions), key=lambda row: (row["question_type"], len(row["question"].split())))
    start = 0
    while start < len(drawn):
        part = [r for r in drawn[start : start + size] if r["question_type"] == drawn[start]["question_type"]]
        start += len(part)
        pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in part]
        yield Batch(part, processor(text=[row["question"] for row in part], images=pictures))


@torch.no_grad()
def ask(model, processor, guide: Guide, batch: Batch, budget: int) -> list[dict]:
    """Put questions to the guide, then to the pruned model; both answers of each, and how sure the guide is."""
    inputs, pad = batch.inputs, processor.tokenizer.pad_token_id
    visual = visual_tokens(locate(model), inputs["input_ids"])
    embeds = guide.embed({name: inputs[name] for name in ("input_ids", "pixel_values")})
    prompts = Prompts.aligned(embeds, inputs["attention_mask"].numpy().astype(bool), visual.numpy())
    answers = guide.ask(prompts)
    sure = surety(guide, prompts, answers)
    importance = answers.importance[visual].view(len(visual), -1)
    with sparsevlm.build("sgl", importance=importance, budget=budget)(model):
        output = model.generate(**inputs, **_ANSWER, pad_token_id=pad)
    found = []
    for i, row in enumerate(batch.rows):
        said = {
            "guide": processor.decode(answers.ids[i, : answers.lengths[i]]),
            "model": processor.decode(output[i, inputs["input_ids"].shape[1] :]),
        }
        result = {"id": row["question_id"], "type": row["question_type"], "answer": row["answer"]}
        result |= {f"{who}_right": normalise(text) == normalise(row["answer"]) for who, text in said.items()} | said
        found.append(
            result | {"confidence": sure.confidence[i], "consistency": sure.consistency[i], "surety": sure.score[i]}
        )
    return found


def leaving(results: list[dict], threshold: float) -> dict[str, float]:
    """Share of questions that leave early above a threshold, and the accuracy then, both 0 to 1."""
    early = np.array([r["surety"] > threshold for r in results])
    right = np.where(early, [r["guide_right"] for r in results], [r["model_right"] for r in results])
    return {"threshold": threshold, "share": float(early.mean()), "accuracy": float(right.mean())}


def auroc(results: list[dict], seed: int = 0, draws: int = 2000) -> tuple[float, float, float] | None:
    """Area under the ROC curve of S against the guide being right, with a 95 % interval (bootstrap over questions).

    Returns:
        None if all of its answers are right, or none is.
    """
    sure = np.array([r["surety"] for r in results])
    right = np.array([r["guide_right"] for r in results])
    if right.all() or not right.any():
        return None
    rng, areas = np.random.RandomState(seed), []
    while len(areas) < draws:
        drawn = rng.randint(len(sure), size=len(sure))
        if 0 < right[drawn].sum() < len(drawn):
            areas.append(roc_auc_score(right[drawn], sure[drawn]))
    return (float(roc_auc_score(right, sure)), *map(float, np.percentile(areas, [2.5, 97.5])))


def report(content: dict) -> str:
    """Markdown of a file of results."""
    results = content["results"]
    accuracy = [100 * np.mean([r[f"{who}_right"] for r in results]) for who in ("guide", "model")]
    area = auroc(results)
    told = "not defined" if area is None else f"{area[0]:.3f} [{area[1]:.3f}, {area[2]:.3f}]"
    rows = [
        {"threshold": f"{t['threshold']:g}", "leave early %": f"{100 * t['share']:.1f}",
         "accuracy %": f"{100 * t['accuracy']:.1f}"}
        for t in (leaving(results, t) for t in content["thresholds"])
    ]  # fmt: skip
    return (
        f"# Early exit on `{content['model']}`, guide {content['guide']}, {content['budget']} tokens\n\n"
        f"{len(results)} questions of `{content['task']}`, seed {content['seed']}; answers of one or two tokens. The "
        f"guide alone: {accuracy[0]:.1f} %, the pruned model alone: {accuracy[1]:.1f} %. AUROC of the guide's surety "
        f"against its being right: {told}.\n\n{markdown_of_records(rows, left=0)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.measure.early_exit", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mini", help="mini, or the folder of another training of it")
    parser.add_argument("--guide", help='folder of a guide, or "self" (default: the shipped one)')
    parser.add_argument("--budget", type=int, default=64, help="of the model, where it has to answer")
    parser.add_argument("--thresholds", default=",".join(map(str, THRESHOLDS)), help="comma-separated")
    parser.add_argument("--questions", type=int, default=270)
    parser.add_argument("--seed", type=int, default=0, help="which set of test scenes")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("results/early_exit"))
    options = parser.parse_args(arguments)
    git = environment.git_at_start()
    try:
        thresholds = [float(t) for t in options.thresholds.split(",")]
        model, processor = sparsevlm.load(options.model)
        guide = Guide(find_guide(options.guide, None, locate(model))[0], _ANSWER["max_new_tokens"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = {"model": Path(options.model).name, "guide": options.guide or "shipped", "budget": options.budget}
    content |= {"task": f"minivqa v{VERSION}", "seed": options.seed, "thresholds": thresholds}
    content["results"] = sorted(
        (
            result
            for batch in batches(processor, options.seed, options.questions, options.batch)
            for result in ask(model, processor, guide, batch, options.budget)
        ),
        key=lambda result: result["id"],
    )
    content |= {"versions": environment.versions(), "hardware": environment.hardware(), "git": git}
    content["date"] = time.strftime("%Y-%m-%d")
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{Path(content['guide']).name}-{options.budget}"
    for path, text in ((f"{name}.json", json.dumps(content) + "\n"), (f"{name}.md", report(content) + "\n")):
        (options.out / path).write_text(text)
        print(options.out / path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
