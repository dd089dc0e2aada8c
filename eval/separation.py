"""Do methods separate on the embedded model, and why? Accuracy per question type and budget, against controls.

    python -m eval.separation                       # mini, all methods, 192 to 16 tokens, 450 questions
    python -m eval.separation --methods sparsevlm,fastv --questions 900 --out results/separation

Beside the methods: `blind` (no picture at all), `oracle` (keeps the tokens that show the answer), `saliency` (as
SparseVLM, but rated by the picture), `random`, and `random_layer (match=sparsevlm)` (random tokens at SparseVLM's
layers and in its numbers: as much is computed). For each the share of the answer's tokens that its first stage keeps,
and for SparseVLM the words that became raters. Every setting is a file; what is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from PIL import Image

from eval.runs import environment
from eval.runs.settings import fingerprint
from eval.separation_report import Setting, write
from eval.tasks.controls import Oracle, Saliency
from eval.tasks.minivqa.dataset import VERSION, rows
from eval.tasks.minivqa.utils import normalise
from sparsevlm.methods.base import Method
from sparsevlm.models.checkpoint import find_checkpoint

BUDGETS = (192, 128, 64, 32, 16)
_CONTROLS = {"oracle": Oracle, "saliency": Saliency}
_LEFT_OUT = ("none", "anchorprune", "cdpruner")  # the first is run once, the others need a CLIP text tower


def build(setting: Setting) -> Method:
    """Build the method or control of a setting."""
    if setting.method in _CONTROLS:
        return _CONTROLS[setting.method](budget=setting.budget, **setting.options)
    return sparsevlm.build(setting.method, budget=setting.budget, **setting.options)


def settings(names: Sequence[str] | None, budgets: Sequence[int]) -> list[Setting]:
    """`none` and `blind`, then every method, control and variant of SparseVLM at every budget."""
    variants: list[tuple[str, dict]] = [(name, {}) for name in (*_CONTROLS, *sparsevlm.methods())]
    variants += [("sparsevlm", {"raters": rule}) for rule in ("all", "centred")]
    variants += [("sparsevlm", {"raters": "all", "recycle": 0}), ("random_layer", {"match": "sparsevlm"})]
    chosen = [(n, o) for n, o in variants if n not in _LEFT_OUT and (names is None or n in names)]
    if names is not None and (unknown := set(names) - {n for n, _ in variants} - {"none", "blind"}):
        raise ValueError(f"unknown method {min(unknown)!r}; known: {', '.join(sorted({n for n, _ in variants}))}")
    return [Setting("none"), Setting("blind"), *(Setting(n, b, o) for n, o in chosen for b in budgets)]


@dataclass
class Batch:
    """Questions of one type, so that none is padded much and all are answered in as many steps."""

    rows: list[dict]
    inputs: dict
    blind: dict


def batches(processor, seed: int, questions: int, size: int) -> Iterator[Batch]:
    """The first `questions` of minivqa, by type and length."""
    drawn = sorted(rows(seed, questions), key=lambda row: (row["question_type"], len(row["question"].split())))
    start = 0
    while start < len(drawn):
        part = [r for r in drawn[start : start + size] if r["question_type"] == drawn[start]["question_type"]]
        start += len(part)
        text = [row["question"] for row in part]
        pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in part]
        yield Batch(part, processor(text=text, images=pictures), processor(text=text))


@torch.no_grad()
def answer(model, processor, setting: Setting, batch: Batch) -> list[dict]:
    """What became of each question: right or wrong, share of the answer's tokens kept, rater words."""
    inputs = batch.blind if setting.method == "blind" else batch.inputs
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
    if setting.budget is None:
        output, records = model.generate(**inputs, **options), None
    else:
        method = build(setting)
        if isinstance(method, Oracle):
            method = replace(method, targets=[row["target_patches"] for row in batch.rows])
        with method(model) as trace:
            output = model.generate(**inputs, **options)
        records = trace.prefills[-1]
    length = inputs["input_ids"].shape[1]
    found = []
    for i, row in enumerate(batch.rows):
        text = processor.decode(output[i, length:])
        right = normalise(text) == normalise(row["answer"])
        result = {"id": row["question_id"], "type": row["question_type"], "right": right}
        if records is not None and records.stages:
            result |= _kept(records, i, row["target_patches"])
            words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][i, records.raters[i]].tolist())
            if words:
                result["raters"] = words
        found.append(result)
    return found


def _kept(records, i: int, targets: list[int]) -> dict:
    """Share of the answer's tokens behind the first stage; left out where the tokens left are no longer patches."""
    origin = records.stages[0].origin[i].tolist()
    if not targets or all(index < 0 for index in origin):
        return {}
    return {"kept": len(set(targets) & set(origin)) / len(targets)}


def run(model, processor, todo: list[Setting], folder: Path, identity: dict, size: int) -> None:
    """Runs what is not there yet; `folder` then holds one file per setting."""
    folder.mkdir(parents=True, exist_ok=True)
    data: list[Batch] | None = None
    git = environment.git_at_start()
    started = time.monotonic()
    for number, setting in enumerate(todo, 1):
        content = identity | {"setting": asdict(setting)}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        name = "-".join([setting.method, *(f"{v}" for v in setting.options.values()), str(setting.budget or "full")])
        path = folder / f"{name}-{key}.json"
        if path.exists():
            continue
        if data is None:
            data = list(batches(processor, identity["seed"], identity["questions"], size))
        begun = time.monotonic()
        try:
            results = [result for batch in data for result in answer(model, processor, setting, batch)]
        except ValueError as error:  # a budget that the method cannot express: said in the report
            results, content["refused"] = [], str(error)
        content |= {
            "results": sorted(results, key=lambda result: result["id"]),
            "seconds": round(time.monotonic() - begun, 1),
            "versions": environment.versions(),
            "hardware": environment.hardware(),
            "git": git,
            "date": time.strftime("%Y-%m-%d"),
        }
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(content) + "\n")
        os.replace(draft, path)
        right = sum(r["right"] for r in results) / max(1, len(results))
        left = (time.monotonic() - started) / number * (len(todo) - number) / 60
        shown = content.get("refused") or f"{right:.3f}"
        print(f"{number}/{len(todo)} {setting.label} {setting.budget or ''}: {shown} ({left:.0f} min left)", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.separation", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mini", help="mini, or the folder of another training of it")
    parser.add_argument("--methods", help="comma-separated; default: all")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--questions", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0, help="which set of test scenes")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("results/separation"))
    options = parser.parse_args(arguments)
    try:
        names = options.methods.split(",") if options.methods else None
        todo = settings(names, [int(b) for b in options.budgets.split(",")])
        weights = fingerprint(find_checkpoint(options.model))
        model, processor = sparsevlm.load(options.model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    identity = {"model": Path(options.model).name, "weights": weights, "task": f"minivqa v{VERSION}"}
    identity |= {"seed": options.seed, "questions": options.questions}
    try:
        run(model, processor, todo, options.out, identity, options.batch)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for path in write(options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
