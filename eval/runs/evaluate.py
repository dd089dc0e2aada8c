"""Execute runs, from settings to results folders: generate answers, and score them with lmms-eval's own evaluator.

All runs of one call differ only in the method. Their answers are generated in one pass (eval/generate); then each run
is scored from its ledger. An error while scoring therefore loses no answer, and scores do not depend on the number of
processes.
"""

from __future__ import annotations

import sparsevlm  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from eval.errors import UserError, one_line
from eval.generate.features import FeatureStore, shares_features
from eval.generate.generator import GenerationError, Generator, RunState, plan_batches
from eval.generate.ledger import Failure, Ledger
from eval.generate.pictures import decoded_once, remember_pixels
from eval.processes import Processes, single_process_env
from eval.runs.judging import judged, look_for_judge
from eval.runs.progress import Progress
from eval.runs.reuse import open_folder
from eval.runs.settings import ModelSettings, RunSettings
from eval.runs.writer import RunFolder, files
from eval.tasks.requests import SEED, Questions, build_requests, load_questions, quiet

if TYPE_CHECKING:
    from eval.tasks.loading import Loaded


class IncompleteRun(RuntimeError):
    """Not every question has an answer and a score, or a recorded error."""


@dataclass
class Job:
    """One run and the state of its execution.

    Attributes:
        error: why it has no results; None if it has.
        excluded: number of questions recorded as failed.
        not_judged: why the language model that should judge did not; None if it did.
    """

    run: RunSettings
    folder: RunFolder
    error: Exception | None = None
    excluded: int = 0
    not_judged: str | None = None
    state: RunState | None = field(default=None, repr=False)


def execute(jobs: Sequence[Job], command: str, progress: Progress, processes: Processes) -> None:
    """Answer all questions that are not in the ledgers, score each run, and publish its folder.

    The error of a job that fails is stored in `job.error`; the others continue.

    Args:
        jobs: runs of the same model, task and generation settings.
        command: the command line that started the runs, for env.json.
        progress: notified of the questions, and of answers as they are generated.

    Raises:
        UserError: the task cannot be prepared or the model cannot be loaded.
        eval.processes.ProcessGone: another process ended.
    """
    quiet()
    for job in jobs:
        if processes.first:
            _guarded(job, partial(open_folder, job.folder, job.run))
    opened = processes.gather([job.error is None for job in jobs])[0]
    to_do = [job for job, is_open in zip(jobs, opened, strict=True) if is_open]
    if to_do:
        _ask_and_score(to_do, command, progress, processes)
    outcomes = processes.gather([(_portable(job.error, processes), job.excluded, job.not_judged) for job in jobs])[0]
    for job, outcome in zip(jobs, outcomes, strict=True):
        job.error, job.excluded, job.not_judged = outcome


def _ask_and_score(jobs: Sequence[Job], command: str, progress: Progress, processes: Processes) -> None:
    first = jobs[0].run
    loaded, tasks = _tasks(first, processes)
    if processes.first:
        look_for_judge(loaded)
    requests = [request for task in tasks.values() for request in task.requests]
    batches = plan_batches(requests, first.batch_size)[processes.number :: processes.count]
    with ExitStack() as stack:
        _open_states(jobs, stack, processes)
        states = {job.run.label: job.state for job in jobs if job.error is None}
        share = [request for batch in batches for request in batch]
        known = sum(state.look_up(share) for state in states.values())
        progress.watch(states, len(share))
        progress(len(share) * len(states), known)
        if any(len(state.answers) < len(share) for state in states.values()):
            for job in (job for job in jobs if job.error is None):
                _guarded(job, partial(_install, job))
            states = {job.run.label: job.state for job in jobs if job.error is None}
            _generator(first, tasks).ask(batches, list(states.values()), partial(progress, 0))
        _exchange_errors(jobs, processes)
        if processes.first:
            for job in jobs:
                if job.error is None:
                    _guarded(job, partial(_score, job, loaded, tasks, requests, command))


def sample(job: Job, few: int, processes: Processes) -> RunState:
    """Answer a few batches of a run, spread over its questions, to estimate its time; the answers are kept.

    Raises:
        Exception: any error with which the run itself will fail.
    """
    run = job.run
    if processes.first:
        _guarded(job, partial(open_folder, job.folder, run))
    if error := processes.gather(_portable(job.error, processes))[0]:
        raise error
    _, tasks = _tasks(run, processes)
    requests = [request for task in tasks.values() for request in task.requests]
    batches = plan_batches(requests, run.batch_size)[processes.number :: processes.count]
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * few)] for i in range(few)] if batches else []
    with ExitStack() as stack:
        _open_states([job], stack, processes)
        if job.error is not None:
            raise job.error
        job.state.look_up(requests)
        generator = _generator(run, tasks)
        generator.ask(chosen[:1], [job.state], lambda answered: None)
        job.state.asked, job.state.spent = 0, 0.0  # the first batch also pays for what is loaded once
        generator.ask(chosen[1:], [job.state], lambda answered: None)
    return job.state


def _open_states(jobs: Sequence[Job], stack: ExitStack, processes: Processes) -> None:
    for job in jobs:
        job.state = RunState(job.run.method, None, job.run.batch_size)
        _guarded(job, partial(_open_ledger, job, stack, processes.number))


def _generator(run: RunSettings, tasks: dict[str, Questions]) -> Generator:
    documents = {
        name: {split: decoded_once(rows) for split, rows in task.documents.items()} for name, task in tasks.items()
    }
    _, processor = _load(run.model)
    remember_pixels(processor, run.feature_mb << 20)
    return Generator(processor, _store(run.model, run.feature_mb), documents, on_error=run.on_error)


def _guarded(job: Job, step: Callable[[], None]) -> None:
    """Do one step of one job; an error ends only this job."""
    try:
        step()
    except Exception as error:
        job.error = error


def _open_ledger(job: Job, stack: ExitStack, process: int) -> None:
    try:
        job.state.ledger = stack.enter_context(Ledger(job.folder.ledger, job.run.answers_hash(), process))
    except BlockingIOError as error:
        raise UserError(f"{one_line(error)}: wait for it to finish") from error


def _install(job: Job) -> None:
    """See that the method works on the model before anything is asked.

    Raises:
        UserError: the model lacks what the method needs.
    """
    try:
        job.state.shares = shares_features(_load(job.run.model)[0], job.run.method)
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error


def _exchange_errors(jobs: Sequence[Job], processes: Processes) -> None:
    """Share between all processes which runs failed in any of them."""
    mine = [_portable(job.error or job.state.error, processes) for job in jobs]
    for job, errors in zip(jobs, zip(*processes.gather(mine), strict=True), strict=True):
        job.error = next((error for error in errors if error is not None), None)


def _portable(error: Exception | None, processes: Processes) -> Exception | None:
    """Return the error in a form that can be sent to another process."""
    if processes.count == 1 or error is None or type(error) in (UserError, GenerationError, IncompleteRun):
        return error
    return RuntimeError(f"{type(error).__name__}: {one_line(error)}")


def _tasks(run: RunSettings, processes: Processes) -> tuple[Loaded, dict[str, Questions]]:
    """Load the run's questions, also by the name of lmms-eval's task. The first process makes or downloads the data."""
    out = error = None
    for turn in (True, False):
        if processes.first == turn:
            try:
                out = load_questions(run.task, run.limit, run.max_new_tokens)
            except UserError as failure:
                error = failure
        if error := next((e for e in processes.gather(error) if e is not None), None):
            raise error
    return out


# ---- scoring -------------------------------------------------------------------------------------------------------
def _score(job: Job, loaded: Loaded, tasks: dict[str, Questions], requests: Sequence, command: str) -> None:
    """Score one run from its ledger and publish its folder.

    Raises:
        IncompleteRun: a question without answer, score and recorded error.
    """
    from eval.generate.lmms_model import Recorded

    run, state = job.run, job.state
    state.ledger.read()  # also what the other processes wrote
    state.look_up(requests)
    excluded = [f for r in requests if (f := _failure(state.ledger, r))]
    job.excluded = len(excluded)
    missing = len(requests) - len(excluded) - len(state.answers)
    if missing:
        raise IncompleteRun(f"{len(requests)} questions were to be answered, {missing} were not")
    if not state.answers:
        raise GenerationError(f"not one question could be answered; the first: {excluded[0].error}")
    excluded_keys = {(f.task, f.doc_id) for f in excluded}
    evaluate = partial(
        _evaluate, Recorded(state.answers), tasks, excluded_keys, str(job.folder.partial), loaded.parallel
    )
    evaluated, job.not_judged = judged(loaded, job.folder, evaluate)
    samples = loaded.samples(evaluated)
    answers = [state.answers.get(s["key"]) for s in samples]
    if len(samples) + len(excluded) != len(requests) or None in answers:
        raise IncompleteRun(f"{len(requests)} questions were to be scored, {len(samples) - answers.count(None)} were")
    metrics = loaded.aggregate(evaluated, samples)
    names = [name.split(",")[0] for name in metrics]
    not_scored = loaded.not_scored(names, job.not_judged)
    git = job.folder.git()
    contents = files(run, samples, metrics, answers, excluded, command, loaded.about(names), not_scored, git)
    contents |= loaded.files(samples)
    job.folder.publish(contents, keep_answers=bool(loaded.task.judge))


def _failure(ledger: Ledger, request) -> Failure | None:
    context, _, _, doc_id, task, _ = request.args
    return ledger.failure(task, doc_id, context)


def _evaluate(model, tasks: dict[str, Questions], excluded: set[tuple], output: str, parallel: int) -> dict:
    """Evaluate recorded answers with lmms-eval; excluded documents are left out."""
    from lmms_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    originals = {}
    for name, questions in tasks.items():
        model.task_dict[name] = questions.documents
        originals[name] = build = questions.task.build_all_requests
        questions.task.build_all_requests = partial(_build_without, questions.task, build, excluded)
    try:
        with single_process_env():
            return evaluate(
                lm=model,
                task_dict={name: questions.task for name, questions in tasks.items()},
                limit=max(len(questions.requests) for questions in tasks.values()),
                bootstrap_iters=0,
                process_docs_parallel=parallel,
                cli_args=argparse.Namespace(output_path=output, process_with_media=False, reasoning_tags=None),
            )
    finally:
        for name, build in originals.items():
            tasks[name].task.build_all_requests = build


def _build_without(task, build: Callable, excluded: set[tuple], **arguments) -> None:
    """Build lmms-eval's requests without those of excluded documents: it scores no document without a request."""
    build_requests(build, **arguments)
    task._instances = [i for i in task.instances if (i.args[4], i.args[3]) not in excluded]


# ---- models --------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _load(model: ModelSettings):
    """Load the model and its processor; the last ones stay in memory for the next run of this process."""
    options = {k: v for k, v in vars(model).items() if k not in ("name", "pretrained")}
    try:
        return sparsevlm.load(model.pretrained, **options)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot load the model {model.name}: {one_line(error)}") from error


@lru_cache(maxsize=1)
def _store(model: ModelSettings, megabytes: int) -> FeatureStore:
    return FeatureStore(_load(model)[0], megabytes << 20)
