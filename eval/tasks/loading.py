"""A task with its questions, ready for lmms-eval; what is missing or broken is refused before a model is loaded."""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import copy
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import lmms_eval.tasks as shipped
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import load_yaml_config
from tenacity import stop_after_attempt

from eval.errors import UserError, one_line
from eval.processes import single_process_env
from eval.tasks.base import EXACT_MATCH, NO_JUDGE, Task, TaskSettings
from eval.tasks.folders import FOLDER, cache_dir, hf_home
from eval.tasks.generated import Generated
from eval.tasks.judge import Judge, judge_of
from eval.tasks.questions import as_the_authors
from eval.tasks.video_qa import data as video_qa

MODEL_NAME = "sparsevlm"  # of our prompts in lmms-eval's task files: there are none, so the default ones are taken
JUDGED_AT_ONCE = 8


@dataclass
class Loaded:
    """A task, loaded.

    Attributes:
        tasks: for `simple_evaluate(tasks=...)`, with its `limit` left out.
        manager: for `simple_evaluate(task_manager=...)`.
        n: questions.
        parallel: for `simple_evaluate(process_docs_parallel=...)`: above 1 where a judge is asked.
        judge: None where there is none.
    """

    task: Task
    settings: TaskSettings
    tasks: list[ConfigurableTask]
    manager: TaskManager
    n: int
    parallel: int = 1
    judge: Judge | None = None

    def samples(self, evaluated: Mapping) -> list[dict]:
        """The sample records of what `simple_evaluate` returned, with `task` and `key`: (task, doc_id), by which the
        adapter knows an answer. Of several tasks, `doc_id` becomes unique."""
        found = []
        for task in self.tasks:
            name = task.config.task
            for sample in evaluated["samples"].get(name, []):
                key = name, sample["doc_id"]
                doc_id = sample["doc_id"] if len(self.tasks) == 1 else f"{name}/{sample['doc_id']}"
                found.append({**sample, "task": name, "key": key, "doc_id": doc_id})
        return found

    def aggregate(self, evaluated: Mapping, samples: Sequence[dict]) -> dict[str, float]:
        """All metrics, "<metric>,none" -> value, as lmms-eval names them; the samples' scores become numbers, in place.

        The headline comes first; where nothing was judged, that is exact match; it is missing where no question counts
        for it.
        """
        if self.judge is not None:
            self.judge.put_in_order()
        own = self.task.score(samples)
        if len(self.tasks) == 1:
            given = evaluated["results"][self.tasks[0].config.task]
            known = {k.split(",")[0]: v for k, v in given.items() if "," in k and "_stderr" not in k}
        else:
            known = {}
        metrics = {k: float(v) for k, v in {**known, **own}.items() if isinstance(v, (int, float))}
        headline = self._headline(metrics)
        ordered = {k: metrics[k] for k in (headline, *metrics) if k in metrics}
        return {f"{k},none": v for k, v in ordered.items()}

    def files(self, samples: Sequence[dict]) -> dict[str, str]:
        """Further files of the run's folder, name -> content."""
        return self.task.files(samples, self.settings)

    def _headline(self, found: Collection[str]) -> str:
        """The metric for the tables, of those that were found."""
        headline = self.task.headline(self.settings)
        return EXACT_MATCH if self.task.judge and headline not in found else headline

    def not_scored(self, found: Collection[str], reason: str | None) -> dict[str, str]:
        """Judged metrics that are not among those `found` -> why."""
        return {m: reason or NO_JUDGE for m in self.task.metrics if m not in found} if self.task.judge else {}

    def about(self, found: Collection[str]) -> dict:
        """What was asked, for metrics.json; `found`: names of the metrics that there are."""
        headline = self._headline(found)
        judge = None
        if self.judge is not None:
            versions = sorted(self.judge.versions)
            judge = {"model": self.judge.model, "url": self.judge.url, "versions": versions}
        elif self.task.judge:
            judge = {"model": headline, "note": "no language model judged; this compares with no published number"}
        return {
            "lmms_tasks": [t.config.task for t in self.tasks],
            "metric": headline,
            "scale": self.task.metrics[headline],
            "computed_by": "this project" if headline in self.task.ours else "lmms-eval",
            "judge": judge,
            "data": [_source(t) for t in self.tasks],
            "note": self.task.note,
        }


def load(task: Task, settings: TaskSettings, limit: int | None) -> Loaded:
    """Load the questions of a task and see that everything else it needs is there.

    Args:
        limit: the first N questions; whole groups only (pairs of MME, circles of MMBench, ...), and shared between
            splits or sub-tasks where there are several.

    Raises:
        UserError: data cannot be found or is damaged, or videos are missing.
    """
    os.environ.setdefault("HF_HOME", str(hf_home()))  # some of lmms-eval's tasks insist
    judge = judge_of(settings.options) if task.judge else None
    logging.getLogger("datasets").setLevel(logging.ERROR)  # "Using the latest cached version", for every table
    try:
        with single_process_env():  # lmms-eval would wait for the other processes, which wait for this one
            manager = task_manager(task.folder)
            return _load(manager, task, settings, limit, judge)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load the task {task.name}: {_explain(error, task)}") from error


def _load(manager: TaskManager, task: Task, settings: TaskSettings, limit: int | None, judge: Judge | None) -> Loaded:
    shares = _shares(limit, len(task.lmms))
    tasks = [
        _task(manager, task, settings, name, share) for name, share in zip(task.lmms, shares, strict=True) if share != 0
    ]
    n = sum(len(t.eval_docs) for t in tasks)
    if task.video and not isinstance(task, Generated):
        for t in tasks:
            check_videos(t)
    return Loaded(task, settings, tasks, manager, n, JUDGED_AT_ONCE if judge else 1, judge)


def _shares(limit: int | None, tasks: int) -> list[int | None]:
    """How many of the first `limit` questions each of several tasks asks."""
    if limit is None:
        return [None] * tasks
    return [limit // tasks + (i < limit % tasks) for i in range(tasks)]


@lru_cache(maxsize=32)
def task_manager(folder: str) -> TaskManager:
    """Knows the tasks of one folder only; lmms-eval's index of all of them takes seconds."""
    own = folder.startswith("own:")
    path = FOLDER / folder.removeprefix("own:") if own else Path(shipped.__file__).parent / folder
    return TaskManager(include_path=str(path), include_defaults=False, model_name=MODEL_NAME)


def _task(manager: TaskManager, task: Task, settings: TaskSettings, name: str, limit: int | None) -> ConfigurableTask:
    for method in (ConfigurableTask.download, ConfigurableTask.process_results):
        method.retry.reraise = True  # the error itself, instead of tenacity's
    ConfigurableTask.process_results.retry.stop = stop_after_attempt(1)  # scoring does not get better by waiting
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    ConfigurableTask.download.retry.stop = stop_after_attempt(1 if offline else 5)
    with quiet_import():
        if isinstance(task, Generated):
            entry = task.prepare(settings.seed, limit or task.size)
        else:
            entry = {"task": name, **_entry(manager, task, settings, name, limit)}
        return get_task_dict([entry], manager, "simple")[name]


def _entry(manager: TaskManager, task: Task, settings: TaskSettings, name: str, limit: int | None) -> dict:
    """What is replaced of a task's configuration."""
    config = load_yaml_config(manager.task_index[name]["yaml_path"], mode="simple")
    kwargs = copy.deepcopy(config.get("dataset_kwargs") or {})
    if not _logged_in():
        kwargs.pop("token", None)  # with `token: True` even public data are refused without a login
    overrides = {"dataset_kwargs": kwargs, **as_the_authors(task.folder), **task.overrides(settings)}
    generation = overrides.get("generation_kwargs") or config.get("generation_kwargs") or {}
    overrides["generation_kwargs"] = {**generation, "until": list(task.until)}
    if task.folder == "own:video_qa":
        folder = settings.options["data"]
        folder = Path(folder).expanduser() if folder else video_qa.default_folder(task.name)
        file = video_qa.keep(video_qa.rows(folder, limit), cache_dir() / "video_qa", task.name)
        overrides["dataset_kwargs"] = {"data_files": {"test": str(file)}}
    if kwargs.get("video") and offline_without(kwargs["cache_dir"]):
        raise FileNotFoundError(
            f"there is no folder {hf_home() / kwargs['cache_dir']} with the videos, and the hub cannot be asked for "
            "them (HF_HUB_OFFLINE=1)"
        )
    overrides["process_docs"] = _first(overrides.get("process_docs"), task, limit)
    return overrides


def offline_without(folder: str) -> bool:
    return os.environ.get("HF_HUB_OFFLINE") == "1" and not (hf_home() / folder).is_dir()


def _first(before: Callable | None, task: Task, limit: int | None) -> Callable:
    """A task's process_docs: the first `limit` questions in an order that keeps groups together.

    The order is the same whatever the limit, so that a question has one number in all runs.
    """

    def process_docs(dataset):
        dataset = dataset if before is None else before(dataset)
        if task.group is None:
            return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        columns = dataset.select_columns(list(task.columns))[:]
        keys = [task.group(*values) for values in zip(*(columns[c] for c in task.columns), strict=True)]
        return dataset.select(order(keys, limit, task.interleave))

    return process_docs


def order(keys: Sequence, limit: int | None, interleave: bool) -> list[int]:
    """Rows group by group, or with groups taking turns; cut after the last group (or turn) within the limit, but never
    before the first."""
    groups = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    rows = [list(g) for g in groups.values()]
    if interleave:
        longest = max(map(len, rows), default=0)
        rows = [[g[i] for g in rows if i < len(g)] for i in range(longest)]
    out: list[int] = []
    for group in rows:
        if limit is not None and out and len(out) + len(group) > limit:
            break
        out += group
    return out


def check_videos(task: ConfigurableTask) -> None:
    """See that the files of all questions' videos are there.

    Raises:
        FileNotFoundError: how many are not, and one of them.
    """
    missing, asked = [], 0
    for doc in task.eval_docs_no_media:
        asked += 1
        try:
            files = task.doc_to_visual(doc)
        except (FileNotFoundError, SystemExit) as error:
            missing.append(one_line(error))
        else:
            missing += [f for f in files if isinstance(f, str) and not Path(f).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the videos of {len(missing)} of {asked} questions of {task.config.task} are missing, for example "
            f"{missing[0]}; they belong into {hf_home()}"
        )


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import lmms-eval's tasks without their side effects.

    The module for MM-Vet makes a client, which wants a key (it is never used); the one for NExT-QA downloads
    dictionaries, again for each of its functions (they are for its open-ended half).
    """
    import nltk

    had, download = os.environ.get("OPENAI_API_KEY"), nltk.download
    os.environ["OPENAI_API_KEY"], nltk.download = had or "none", lambda *_, **__: False
    try:
        yield
    finally:
        nltk.download = download
        if had is None:
            del os.environ["OPENAI_API_KEY"]


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _explain(error: Exception, task: Task) -> str:
    text = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, (FileNotFoundError, ValueError)) and "Couldn't" not in text:
        text = one_line(error)
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "Couldn't" in text:
        text += "; its data are fetched from the model hub once (unset HF_HUB_OFFLINE), log in if they are gated"
    return text


def _source(task: ConfigurableTask) -> dict:
    """Where a task's questions came from."""
    docs = task.eval_docs
    return {
        "path": str(task.DATASET_PATH),
        "config": task.DATASET_NAME,
        "split": task.config.test_split or task.config.validation_split,
        "n": len(docs),
        "fingerprint": getattr(docs, "_fingerprint", None),
    }
