"""Fabricated run folders that follow the contract to the letter: for tests of what reads them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

import sparsevlm

ABOUT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None, "os": "Linux x86_64"},
    "git": None,
    "date": "2026-01-02T03:04:05+00:00",
}
MODEL = {
    "name": "mini", "pretrained": "mini", "revision": None, "dtype": "float32", "device": "cpu",
    "attn_implementation": "sdpa", "prompt": "hub", "image_aspect_ratio": "crop",
}  # fmt: skip


def accuracy_run(
    results: Path,
    method: str = "none",
    budget: int | str | None = "full",
    scores: np.ndarray | None = None,
    model: str = "mini",
    seed: int = 0,
    gmacs: float | None = 5.0,
    tokens: tuple[float, float] = (200.0, 180.0),
    digest: str = "0123abcd",
    types: tuple[str, ...] = (),
    **options,
) -> Path:
    """Write `<results>/runs/minivqa__...` and return it. `scores`: one 0 or 1 per question; `types` take turns."""
    scores = np.array([1.0, 1.0, 1.0, 0.0]) if scores is None else np.asarray(scores, float)
    n, chosen = len(scores), asdict(sparsevlm.build(method, budget=budget, **options))
    name = "explicit" if chosen.pop("budget") is None else budget
    chosen = json.loads(json.dumps(chosen))
    mean = float(scores.mean())
    error = 1.96 * float(scores.std()) / n**0.5
    metrics = {
        "schema": 1, "task": "minivqa", "model": model, "method": method, "options": chosen, "budget": name,
        "config_hash": digest, "n": n,
        "metrics": {
            "accuracy": {"value": mean, "ci95": [max(0, mean - 1.2 * error), min(1, mean + error)], "n": n},
            **{f"accuracy/{kind}": {"value": float(scores[at].mean()), "ci95": None, "n": len(scores[at])}
               for kind, at in _types(n, types).items()},
        },
        "tokens": {"visual": 576.0, "entering": tokens[0], "leaving": tokens[1]},
        "time": {}, "cost": {"text_tokens": 11, "prefill_gmacs": gmacs}, "seed": seed, **ABOUT,
    }  # fmt: skip
    samples = [
        {"doc_id": i, "question": f"q{i}", "question_type": types[i % len(types)] if types else "count",
         "target": "7", "answer": "7" if s else "3", "scores": {"accuracy": s}, "input_tokens": 580 + i % 3,
         "leaving": tokens[1] + (i % 3 - 1 if method == "sparsevlm_rank" else 0)}
        for i, s in enumerate(scores)
    ]  # fmt: skip
    config = {
        "model": {**MODEL, "name": model}, "method": {"name": method, **chosen}, "budget": name,
        "task": {"name": "minivqa", "seed": seed}, "limit": n, "max_new_tokens": None, "batch_size": 8,
    }  # fmt: skip
    return write(results / "runs" / f"minivqa__{model}__{method}__{name}__{digest}", config, metrics, samples)


def _types(n: int, types: tuple[str, ...]) -> dict[str, slice]:
    return {kind: slice(i, n, len(types)) for i, kind in enumerate(types)}


def benchmark_run(
    results: Path,
    task: str,
    scores: dict[str, float],
    method: str = "none",
    budget: int | str = "full",
    n: int = 3,
    limit: int | None = None,
    digest: str = "7b",
    model: dict | None = None,
    task_options: dict | None = None,
    decode_gmacs: float = 6.7,
    each: list[float] | None = None,
    **options,
) -> Path:
    """Write the folder of a 7B run as the papers' benchmarks leave it: metrics that are no mean over questions, but for
    the first one if `each` has its score per question."""
    settings = {**MODEL, "name": "llava_1_5_7b", "pretrained": "llava-1.5-7b", "dtype": "float16",
                "prompt": "vicuna_v1", "image_aspect_ratio": "pad", **(model or {})}  # fmt: skip
    chosen = asdict(sparsevlm.build(method, budget=budget, **options))
    chosen.pop("budget")
    chosen = json.loads(json.dumps(chosen))
    n = n if each is None else len(each)
    metrics = {name: {"value": x, "ci95": None, "n": n} for name, x in scores.items()}
    first = next(iter(scores))
    if each is not None:
        metrics[first]["ci95"] = [min(each), max(each)]
    samples = [
        {"doc_id": i, "question": f"q{i}", "question_type": None, "target": "a", "answer": "a",
         "scores": {} if each is None else {first: each[i]}}
        for i in range(n)
    ]  # fmt: skip
    found = {
        "schema": 1, "task": task, "model": settings["name"], "method": method, "options": chosen, "budget": budget,
        "config_hash": digest, "n": n, "metrics": metrics,
        "tokens": {"visual": 576.0, "entering": 576.0, "leaving": 576.0}, "time": {},
        "cost": {"text_tokens": 50, "prefill_gmacs": 4000.0, "decode_gmacs_per_token": decode_gmacs}, "seed": 0,
        **ABOUT,
    }  # fmt: skip
    config = {
        "model": settings, "method": {"name": method, **chosen}, "budget": budget,
        "task": {"name": task, "seed": 0, **(task_options or {})}, "limit": limit, "max_new_tokens": None,
        "batch_size": 8,
    }  # fmt: skip
    return write(results / "runs" / f"{task}__{settings['name']}__{method}__{budget}__{digest}", config, found, samples)


def latency_run(results: Path, settings: list[tuple[str, int | str, dict]], digest: str = "beef", **changes) -> Path:
    """Write `<results>/runs/latency__mini__...`; the first setting takes 100 ms, the second 90, and so on."""
    rows = []
    for i, (method, budget, options) in enumerate(settings):
        chosen = asdict(sparsevlm.build(method, budget=budget, **options))
        chosen.pop("budget")
        ms = 100.0 - 10 * i
        rows.append({
            "method": method, "budget": budget, "options": json.loads(json.dumps(chosen)), "batch_size": 1,
            "text_tokens": 11, "visual_tokens": 576, "entering": 200.0, "leaving": 180.0,
            "prefill_ms": {"median": ms, "q25": ms - 1, "q75": ms + 1},
            "vision_ms": {"median": 20.0, "q25": 19.0, "q75": 21.0},
            "decode_ms": {"median": 5.0, "q25": 4.0, "q75": 6.0},
            "prefill_ratio": {"median": ms / 100, "q25": ms / 100 - 0.01, "q75": ms / 100 + 0.01},
        })  # fmt: skip
    metrics = {"schema": 1, "task": "latency", "model": "mini", "config_hash": digest, "n": 30, "rows": rows, "seed": 0,
               **ABOUT, **changes}  # fmt: skip
    config = {"model": {"name": "mini", "pretrained": "mini"}, "device": "cpu", "dtype": "float32"}
    return write(results / "runs" / f"latency__mini__{digest}", config, metrics, [])


def write(folder: Path, config: dict, metrics: dict, samples: list[dict]) -> Path:
    """Write the four files of a run folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (folder / "env.json").write_text(json.dumps(ABOUT))
    return folder


def reproduce(results: Path, n: int = 200) -> None:
    """A small series as `make reproduce` makes it, with accuracies that differ between methods."""
    rng = np.random.default_rng(0)
    ease = rng.random(n)  # the same questions are hard for all
    accuracy_run(results, scores=ease < 0.84, gmacs=5.04, tokens=(576.0, 576.0))
    levels = {"random": (0.65, 0.55, 0.40), "sparsevlm": (0.79, 0.76, 0.70), "all": (0.83, 0.82, 0.80)}
    for (label, shares), gmacs in zip(levels.items(), ((1.7, 1.1, 0.6), (2.1, 1.5, 1.0), (2.2, 1.6, 1.1)), strict=True):
        method, options = ("sparsevlm", {"raters": "all"}) if label == "all" else (label, {})
        for budget, share, g in zip((192, 128, 64), shares, gmacs, strict=True):
            digest = f"{label}{budget}"
            accuracy_run(results, method, budget, ease < share, gmacs=g, tokens=(budget * 1.2, budget), digest=digest,
                         **options)  # fmt: skip
