"""`python -m tests.throughput`: questions a second through the whole harness, with a model that costs next to nothing.

A made-up POPE (640x480 JPEGs, six questions about each) is evaluated by `eval.run` with a tiny random LLaVA in the
hub's layout (336 pixels, 576 visual tokens, answers of two words): once unpruned, and once as a sweep of 13 runs as in
the paper's Table 1. Everything counts but imports and loading the model: reading documents, decoding and resizing
pictures, tokenizing, `generate()`, the ledger, scoring, and writing the results.

The last line is JSON: questions per second of the single run, answers per second of the sweep, and the share of the
single run's time that passed outside the model's own forward passes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np

KINDS = ("adversarial", "popular", "random")
LAYERS = 4
METHODS, BUDGETS = "random,fastv,sparsevlm,pyramiddrop", "192,128,64"


def write_data(home: Path, questions: int, pictures: int) -> None:
    """Write a POPE of `questions` about `pictures` as a hub cache; neighbours ask about different pictures."""
    from datasets import Image, Value
    from PIL import Image as Picture

    from tests.eval.tasks.hub_cache import write_dataset

    jpegs = []
    for seed in range(pictures):
        small = np.random.RandomState(seed).randint(0, 255, (30, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Picture.fromarray(small).resize((640, 480), Picture.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        jpegs.append({"bytes": buffer.getvalue(), "path": None})
    text = Value("string")
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    schema = {**dict.fromkeys(names, text), "image": Image()}
    things = ("dog", "cat", "dining table", "person", "traffic light", "cup")
    rows = [
        {
            **dict(id=str(n), question_id=str(n), image_source=f"p{n % pictures}", image=jpegs[n % pictures]),
            "question": f"Is there a {things[n // pictures % len(things)]} in the image?",
            "answer": ("no", "yes")[n % 2],
            "category": KINDS[n * len(KINDS) // questions],
        }
        for n in range(questions)
    ]
    write_dataset(home, "lmms-lab-encoder/POPE", None, {"test": rows}, schema)


@contextmanager
def model_time() -> Iterator[list[float]]:
    """Collect the seconds spent in the vision tower and the language model's forward passes, in a list of one."""
    from transformers import LlavaForConditionalGeneration, LlavaModel

    spent, inside = [0.0], []

    def timed(function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            start = time.perf_counter()
            inside.append(None)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    spent[0] += time.perf_counter() - start

        return run

    patched = [(LlavaForConditionalGeneration, "forward"), (LlavaModel, "get_image_features")]
    originals = [getattr(owner, name) for owner, name in patched]
    for (owner, name), original in zip(patched, originals, strict=True):
        setattr(owner, name, timed(original))
    try:
        yield spent
    finally:
        for (owner, name), original in zip(patched, originals, strict=True):
            setattr(owner, name, original)


def measure(folder: Path, questions: int, batch_size: int) -> dict:
    """Run both evaluations in this process, whose HF_HOME holds the data.

    Returns:
        `questions_per_s`, `answers_per_s_13`, `outside_model_share`.

    Raises:
        RuntimeError: an evaluation failed.
    """
    from eval.run import main

    common = [
        "model=llava_1_5_7b", f"model.pretrained={folder / 'model'}", "model.dtype=float32", "task=pope",
        f"batch_size={batch_size}", "max_new_tokens=2",
    ]  # fmt: skip

    def evaluate(name: str, *arguments: str) -> float:
        start = time.perf_counter()
        if status := main([*arguments, *common, f"results_dir={folder / name}"]):
            raise RuntimeError(f"eval.run ended with status {status}")
        return time.perf_counter() - start

    evaluate("warm", "method=none", "limit=48")  # imports what is imported late, and loads the model
    with model_time() as in_model:
        single = evaluate("single", "method=none")
    outside = 1 - in_model[0] / single
    budgets = f"budget={BUDGETS}"
    start = time.perf_counter()
    evaluate("sweep", "-m", f"method={METHODS}", budgets)
    evaluate("sweep", "method=none")
    swept = time.perf_counter() - start
    return {
        "questions_per_s": round(questions / single, 1),
        "answers_per_s_13": round(13 * questions / swept, 1),
        "outside_model_share": round(outside, 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        print(json.dumps(measure(args.inside, args.questions, args.batch_size)))
        return 0
    from tests.hub_layout import save_llava_7b

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder, args.questions, args.pictures)
        save_llava_7b(folder / "model", layers=LAYERS)
        environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.throughput", "--inside", scratch]
        for option in ("questions", "pictures", "batch_size"):
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
