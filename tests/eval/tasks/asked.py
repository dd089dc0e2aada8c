"""Tasks asked of a model that knows the answers, by lmms-eval's own evaluator."""

from __future__ import annotations

import argparse

from lmms_eval.evaluator import simple_evaluate

from eval.tasks import TASKS, load, task_settings
from tests.eval.tasks.oracle import Answers


def config(name: str, judge_url: str = "", **options) -> dict:
    """The config group `task`, with a judge where the task has one."""
    task, found = TASKS[name], {"name": name}
    if task.judge:
        found |= {"judge": "stand-in", "judge_url": judge_url, "judge_timeout": 5}
    if "judge_runs" in task.options:
        found["judge_runs"] = 2
    return {**found, **options}


def loaded(name: str, limit: int | None = None, judge_url: str = "", **options):
    return load(task_settings(config(name, judge_url, **options)), limit)


def evaluate(tasks: list, manager, model: Answers, folder) -> dict:
    """What lmms-eval makes of a model's answers to several tasks."""
    where = argparse.Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None)
    return simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, process_docs_parallel=8, cli_args=where
    )


def outcome(one, evaluated: dict) -> tuple[list[dict], dict[str, float]]:
    """(samples, metrics) of one loaded task."""
    samples = one.samples(evaluated)
    return samples, {k.removesuffix(",none"): v for k, v in one.aggregate(evaluated, samples).items()}
