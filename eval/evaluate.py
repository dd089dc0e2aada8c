"""One run from settings to results folder, with lmms-eval's own evaluator."""

from __future__ import annotations

import sparsevlm  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache

from eval.errors import UserError, one_line
from eval.ledger import Ledger
from eval.results import RunFolder, files
from eval.settings import ModelSettings, Run
from eval.tasks import FOLDER, TASKS


class IncompleteRun(RuntimeError):
    """lmms-eval returned without an answer and a score for every question."""


def execute(run: Run, folder: RunFolder, command: str, progress: Callable[[int], None] | None = None) -> None:
    """Ask all questions that are not in the folder's ledger, score, and publish the folder.

    Args:
        command: how the run was started, for env.json.
        progress: called with the number of questions that were answered, again and again.

    Raises:
        UserError: results cannot be written, or the model cannot be loaded.
        eval.lmms_model.GenerationError: generation failed; what was answered before is in the ledger.
        IncompleteRun: a question without answer or score.
    """
    folder.open()
    from loguru import logger

    logger.remove()  # lmms-eval reports every step at level INFO
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    from datasets import disable_progress_bars

    disable_progress_bars()
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from eval.lmms_model import SparseVLMAdapter

    n = TASKS[run.task.name].questions(run.limit)
    try:
        task = TASKS[run.task.name].prepare(run.task.seed, n)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot prepare the task {run.task.name}: {one_line(error)}") from error
    model, processor = _load(run.model)
    try:
        ledger = Ledger(folder.ledger, run.config_hash())
    except BlockingIOError as error:
        raise UserError(f"{one_line(error)}: wait for it to finish") from error
    with ledger:
        adapter = SparseVLMAdapter(
            run.model.pretrained, run.method, batch_size=run.batch_size,
            model=model, processor=processor, ledger=ledger, progress=progress,
        )  # fmt: skip
        evaluated = simple_evaluate(
            model=adapter,
            tasks=[task],
            task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False, model_name="sparsevlm"),
            limit=n,
            bootstrap_iters=0,
            process_docs_parallel=1,
            gen_kwargs=f"max_new_tokens={run.max_new_tokens}" if run.max_new_tokens else None,
            cli_args=argparse.Namespace(output_path=str(folder.partial), process_with_media=False, reasoning_tags=None),
        )
        samples = evaluated["samples"][run.task.name]
        answers = [adapter.answers.get((run.task.name, s["doc_id"])) for s in samples]
        if len(samples) != n or None in answers:
            raise IncompleteRun(f"{n} questions were to be answered, {len(samples) - answers.count(None)} were")
        content = files(run, samples, evaluated["results"][run.task.name], answers, command)
    folder.publish(content)


@lru_cache(maxsize=1)
def _load(model: ModelSettings):
    """The model and its processor; the last ones stay in memory for the next run of this process."""
    options = {k: v for k, v in vars(model).items() if k not in ("name", "pretrained")}
    try:
        return sparsevlm.load(model.pretrained, **options)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot load the model {model.name}: {one_line(error)}") from error
