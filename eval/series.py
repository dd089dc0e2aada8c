"""One or several runs: what is there already is skipped, what fails does not stop the others."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from eval.errors import EXCLUDED, UserError, report, worst
from eval.processes import Processes, ProcessGone
from eval.results import RunFolder
from eval.settings import Run

_ROOT = Path(__file__).resolve().parents[1]


def run_series(runs: Sequence[Run], command: str) -> int:
    """Do all runs that have no finished folder yet, with one progress bar over all their questions.

    Runs that differ in the method alone go through their questions together; tasks and models come one after the other.

    Args:
        command: how they were started, for env.json.

    Returns:
        The exit status: 0 if all have a finished folder now, with all questions in it.
    """
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
        self.told: set[str] = set()

    def do(self, runs: Sequence[Run]) -> int:
        folders = {run.run_id(): RunFolder(run.results_dir, run.run_id()) for run in runs}
        finished = self.processes.gather({name for name, folder in folders.items() if folder.finished})[0]
        statuses, together = [], {}
        for run in {run.run_id(): run for run in runs}.values():
            folder = folders[run.run_id()]
            if run.run_id() not in finished:
                together.setdefault(run.company, []).append((run, folder))
                continue
            left_out = folder.excluded()
            statuses.append(EXCLUDED if left_out else 0)
            self._say(f"already there: {folder.path}" + _left_out(left_out))
        if not together:
            return worst(statuses)
        bar = _Bar(shown=self.processes.first)
        for number, company in enumerate(together.values(), 1):
            bar.title = company[0][0].label if len(company) == 1 else f"{len(company)} runs"
            if len(together) > 1:
                bar.title = f"{number} of {len(together)}, {company[0][0].task.name}: {bar.title}"
            statuses += self._company(company, bar)
        bar.close()
        failed = sum(s not in (0, EXCLUDED) for s in statuses)
        if failed and len(statuses) > 1:
            self._say(f"{failed} of {len(statuses)} runs have no results; the same command goes on with them")
        return worst(statuses)

    def _company(self, company: Sequence[tuple[Run, RunFolder]], bar: _Bar) -> list[int]:
        """Runs that differ in the method alone; returns their statuses."""
        from eval.evaluate import Job, execute

        jobs = [Job(run, folder) for run, folder in company]
        try:
            execute(jobs, self.command, bar, self.processes)
        except KeyboardInterrupt:
            bar.close()
            kept = _kept(sum(folder.answers_kept() for _, folder in company))
            who, count = "", self.processes.count
            if count > 1:
                who = f"process {self.processes.number} of {count} was stopped, as all are when one of them ends; "
            print(f"interrupted: {who}{kept}", file=sys.stderr, flush=True)
            raise
        except ProcessGone:
            bar.close()
            raise
        except Exception as error:
            bar.close()
            return [self._tell(error)] * len(jobs)
        statuses = []
        for job in jobs:
            if job.error is None:
                self._say(f"{job.run.label}: {_summary(job.folder)}{_left_out(job.excluded)} -> {job.folder.path}")
                statuses.append(EXCLUDED if job.excluded else 0)
            elif isinstance(job.error, UserError):
                bar.close()
                statuses.append(self._tell(job.error))
            else:
                bar.close()
                what = f"{job.folder.path.name} failed; {_kept(job.folder.answers_kept())}: "
                statuses.append(self._tell(job.error, what))
        return statuses

    def _say(self, text: str) -> None:
        if self.processes.first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _tell(self, error: Exception, what: str = "") -> int:
        """Report an error, but not the same one again for every run."""
        text = f"{what}{error}"
        if not self.processes.first or text in self.told:
            return report(error, what, shown=False)
        self.told.add(text)
        return report(error, what)


def time_runs(runs: Sequence[Run], repeats: int, warmup: int) -> int:
    """Measure the latency of the settings of all runs with scripts/profile.py, at their median prompt length.

    Returns:
        The exit status; 0 also if it had been measured on this machine before.
    """
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))  # scripts/ is no installed package
    from scripts.profile import main

    first = runs[0]
    lengths = [
        json.loads((RunFolder(run.results_dir, run.run_id()).path / "metrics.json").read_text())["cost"]["text_tokens"]
        for run in runs
    ]
    arguments = ["--model", first.model.name, "--results", str(first.results_dir)]
    arguments += ["--text-tokens", str(statistics.median_low(lengths)), "--repeats", str(repeats)]
    arguments += ["--warmup", str(warmup), "--device", first.model.device, "--dtype", first.model.dtype]
    settings = [":".join([r.method.name, str(r.budget), *(f"{k}={json.dumps(v)}" for k, v in r.changed)]) for r in runs]
    try:
        main([*settings, *arguments])
    except SystemExit as stopped:  # it has said why
        return int(stopped.code or 0)
    return 0


class _Bar:
    """Progress over all questions of all runs; appears with the first answer, after whatever can be wrong."""

    def __init__(self, shown: bool) -> None:
        self.total, self.done, self.title, self.shown = 0, 0, "", shown
        self._bar: tqdm | None = None

    def __call__(self, expected: int, answered: int) -> None:
        """Count questions of runs that begin, and answers."""
        self.total += expected
        self.done += answered
        if not self.shown:
            return
        if self._bar is None:
            if not answered:
                return
            interval = 0.1 if sys.stderr.isatty() else 15  # a log file gets a line now and then
            self._bar = tqdm(
                total=self.total, initial=self.done - answered, unit="q", mininterval=interval, file=sys.stderr,
                dynamic_ncols=True,
            )  # fmt: skip
        self._bar.total = self.total
        self._bar.set_description(self.title, refresh=False)
        self._bar.update(answered)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _kept(answers: int) -> str:
    return f"{answers} answers are kept, the same command goes on from there"


def _left_out(questions: int) -> str:
    return f", {questions} questions EXCLUDED (excluded.jsonl says why)" if questions else ""


def _summary(folder: RunFolder) -> str:
    metrics = json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    found, tokens = metrics["metrics"], metrics["tokens"]
    main = "accuracy" if "accuracy" in found else next(iter(found))
    interval = found[main]["ci95"]
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    averages = f"visual tokens per layer {tokens['entering']:.1f} entering, {tokens['leaving']:.1f} leaving"
    return f"{main} {found[main]['value']:.3f}{spread}, {averages}"
