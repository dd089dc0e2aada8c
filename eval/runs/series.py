"""Execute several runs: finished ones are skipped, and a failed one does not stop the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import yaml
from tqdm import tqdm

from eval.errors import EXCLUDED, NOT_JUDGED, UserError, report, worst
from eval.processes import Processes, ProcessGone
from eval.runs.against import compare
from eval.runs.environment import git_at_start
from eval.runs.progress import Group, Progress
from eval.runs.reuse import judged_elsewhere
from eval.runs.settings import RunSettings
from eval.runs.writer import RunFolder
from eval.tasks import TASKS
from eval.tasks.base import EXACT_MATCH

SAMPLED_FROM, SAMPLED_BATCHES = 2000, 4  # answers of a task for which it is worth while, and batches


def run_series(runs: Sequence[RunSettings], command: str) -> int:
    """Execute all runs that have no finished folder yet, with one progress bar over all their questions.

    Runs that differ only in the method are asked question by question together; tasks and models follow one another.

    Args:
        command: the command line that started them, for env.json.

    Returns:
        The exit status: 0 if all have a finished folder with all questions.
    """
    git_at_start()
    processes = Processes()
    try:
        return _Series(processes, command).do(runs)
    except ProcessGone as error:
        return report(error)
    finally:
        processes.close()


class _Series:
    def __init__(self, processes: Processes, command: str) -> None:
        self.processes, self.command = processes, command
        self.reported: set[str] = set()

    def do(self, runs: Sequence[RunSettings]) -> int:
        unique, statuses = self._identified(runs)
        folders = {name: RunFolder(run.results_dir, name) for name, run in unique.items()}
        there = self.processes.gather({name: _there(run, folders[name]) for name, run in unique.items()})[0]
        together = {}
        for name, run in unique.items():
            if isinstance(there[name], UserError):
                statuses.append(self._report(there[name]))
            elif there[name] is None:
                together.setdefault(run.batch_key, []).append((run, folders[name]))
            else:
                statuses.append(self._already_there(run, RunFolder(run.results_dir, there[name])))
        if not together:
            return worst(statuses)
        batches = list(together.values())
        bar = Progress(shown=self.processes.first)
        bar.groups = [self._group(i, batch, len(batches)) for i, batch in enumerate(batches, 1)]
        self._sample(batches, bar.groups)
        for batch, group in zip(batches, bar.groups, strict=True):
            bar.begin(group)
            statuses += self._run_batch(batch, bar)
        bar.close()
        failed = sum(s not in (0, EXCLUDED, NOT_JUDGED) for s in statuses)
        if failed and len(statuses) > 1:
            self._print(f"{failed} of {len(statuses)} runs have no results; rerun the same command to resume")
        return worst(statuses)

    def _identified(self, runs: Sequence[RunSettings]) -> tuple[dict[str, RunSettings], list[int]]:
        """Return run id -> run, without duplicates, and the exit statuses of runs whose questions cannot be loaded.

        The first process loads the tasks first: it makes or downloads their data.
        """
        names = [_name(run) for run in runs] if self.processes.first else []
        names = self.processes.gather(names)[0]
        found, statuses = {}, []
        for run, name in zip(runs, names, strict=True):
            if isinstance(name, Exception):
                statuses.append(self._report(name))
            else:
                found.setdefault(name, run)
        return found, statuses

    def _already_there(self, run: RunSettings, folder: RunFolder) -> int:
        left_out, not_scored = folder.excluded(), folder.not_scored()
        self._print(f"already there: {folder.path}{_excluded_note(left_out)}{_not_judged_note(not_scored)}")
        self.compared(folder)
        missed = not_scored and run.task.options["judge"] != EXACT_MATCH
        return worst([EXCLUDED if left_out else 0, NOT_JUDGED if missed else 0])

    def _group(self, number: int, batch: Sequence[tuple[RunSettings, RunFolder]], of: int) -> Group:
        first = batch[0][0]
        title = first.label if len(batch) == 1 else f"{len(batch)} runs"
        if of > 1:
            title = f"{number} of {of}, {first.task.name}: {title}"
        questions = -(-TASKS[first.task.name].questions(first.limit) // self.processes.count)
        return Group(title, questions, [run.label for run, _ in batch])

    def _sample(self, batches: Sequence[Sequence[tuple[RunSettings, RunFolder]]], groups: Sequence[Group]) -> None:
        """Ask a few questions of every later large task first, to estimate the time left."""
        from eval.runs.evaluate import Job, sample

        rest = [(c, g) for c, g in zip(batches[1:], groups[1:], strict=True) if c[0][0].model == batches[0][0][0].model]
        for batch, group in rest:
            if group.questions * len(batch) < SAMPLED_FROM:
                continue
            job = Job(*batch[0])
            try:
                group.sampled[group.labels[0]] = sample(job, SAMPLED_BATCHES, self.processes)
            except KeyboardInterrupt:
                print(f"interrupted: {_kept(job.folder.answers_kept())}", file=sys.stderr, flush=True)
                raise
            except ProcessGone:
                raise
            except Exception:
                continue  # it fails again in its turn, and is reported then

    def _run_batch(self, batch: Sequence[tuple[RunSettings, RunFolder]], bar: Progress) -> list[int]:
        """Execute runs that differ only in the method; return their exit statuses."""
        from eval.runs.evaluate import Job, execute

        jobs = [Job(run, folder) for run, folder in batch]
        try:
            execute(jobs, self.command, bar, self.processes)
        except KeyboardInterrupt:
            bar.close()
            kept = _kept(sum(folder.answers_kept() for _, folder in batch))
            who, count = "", self.processes.count
            if count > 1:
                who = f"process {self.processes.number} of {count} was stopped (all stop when one of them ends); "
            print(f"interrupted: {who}{kept}", file=sys.stderr, flush=True)
            raise
        except ProcessGone:
            bar.close()
            raise
        except Exception as error:
            bar.close()
            return [self._report(error)] * len(jobs)
        statuses = []
        for job in jobs:
            if job.error is None:
                notes = _excluded_note(job.excluded) + _not_judged_note(job.folder.not_scored())
                self._print(f"{job.run.label}: {_summary(job.folder)}{notes} -> {job.folder.path}")
                self.compared(job.folder)
                statuses.append(worst([EXCLUDED if job.excluded else 0, NOT_JUDGED if job.not_judged else 0]))
            elif isinstance(job.error, UserError):
                bar.close()
                statuses.append(self._report(job.error))
            else:
                bar.close()
                what = f"{job.folder.path.name} failed; {_kept(job.folder.answers_kept())}: "
                statuses.append(self._report(job.error, what))
        return statuses

    def compared(self, folder: RunFolder) -> None:
        """Print how far an unpruned run with the papers' settings is from the published numbers."""
        path = folder.path / "config.yaml"
        if self.processes.first and path.is_file():
            found = compare(folder.metrics(), yaml.safe_load(path.read_text(encoding="utf-8")))
            if found is not None:
                self._print(str(found), sys.stderr if found.loud else None)

    def _print(self, text: str, file=None) -> None:
        if self.processes.first:
            file = file or sys.stdout
            tqdm.write(text, file=file)
            file.flush()

    def _report(self, error: Exception, what: str = "") -> int:
        """Report an error, once for all runs that it concerns."""
        text = f"{what}{error}"
        if not self.processes.first or text in self.reported:
            return report(error, what, shown=False)
        self.reported.add(text)
        return report(error, what)


def _kept(answers: int) -> str:
    return f"{answers} answers are kept; rerun the same command to resume"


def _excluded_note(questions: int) -> str:
    return f", {questions} questions EXCLUDED (excluded.jsonl says why)" if questions else ""


def _not_judged_note(metrics: Mapping[str, str]) -> str:
    reasons = " and ".join(dict.fromkeys(metrics.values()))
    return f", {' and '.join(metrics)} NOT JUDGED: {reasons}; the answers are kept" if metrics else ""


def _name(run: RunSettings) -> str | Exception:
    """Return a run's id, or the error that prevents it."""
    try:
        return run.run_id()
    except Exception as error:
        return error


def _there(run: RunSettings, folder: RunFolder) -> str | UserError | None:
    """Return the name of a finished folder with the run's results, or what is wrong with it; None if there is something
    to do."""
    try:
        if not folder.finished:
            elsewhere = judged_elsewhere(run)
            return elsewhere and elsewhere.path.name
        folder.check()
        return None if run.task.judged and folder.not_scored() else folder.path.name
    except UserError as error:
        return error


def _summary(folder: RunFolder) -> str:
    metrics = json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    found, tokens = metrics["metrics"], metrics["tokens"]
    main = next(iter(found))  # the headline
    interval = found[main]["ci95"]
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    averages = f"visual tokens per layer {tokens['entering']:.1f} entering, {tokens['leaving']:.1f} leaving"
    return f"{main} {found[main]['value']:.3f}{spread}, {averages}"
