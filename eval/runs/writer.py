"""Run folders: `<results_dir>/runs/<task>__<model>__<method>__<budget>__<config hash>/`.

config.yaml    the run's configuration, defaults filled in
metrics.json   what came out (schema 1, below)
judge.jsonl    only where a language model judged: its replies, by the hash of what it was asked
ledger.jsonl   only of tasks that are judged: the answers, so that another judge, or a later one, need not ask again
started.jsonl  beside ledger.jsonl: the commits that gave the answers, one line per process that worked on the run
excluded.jsonl only with on_error=record, if a question could not be answered: doc_id, question, error; one per line
submission.json only of test splits whose answers a server keeps: the file that it takes
samples.jsonl  one line per question: doc_id, question, question_type, target, answer, scores {metric: number},
               input_tokens, output_tokens, visual, entering, leaving, seconds
env.json       versions of all packages, hardware, commit, command, date

metrics.json: schema, task, model, method, options, budget, config_hash, answers_hash (config_hash without the judge:
equal for runs that have the same answers), asked (digests of what was really asked, see digests.py), n (questions
that were scored), excluded (number of questions that could not be answered and are in no score; 0 unless
on_error=record), metrics {name: {value, ci95, n}} (per question type as "accuracy/<type>"; ci95 is null where a metric
is no mean over questions), not_scored {name: reason} (only where a language model should have judged and did not),
benchmark (lmms_tasks, the metric of the papers' tables with its scale and who computed it, judge, data, note), tokens
{visual, entering, leaving} (means over questions of visual tokens: in the prompt, and per layer of the language model;
clamped: questions with fewer than the budget, where their number depends on the picture), positions ("original" where
they have several axes: survivors keep their own, whatever the method's option says),
time, cost (GMACs of one question of median length; null with a note where the method cannot be counted), seed,
versions, hardware, git, date.

git {commit, dirty} is read when a run starts. dirty: the commit alone does not say which code made the run, because
files were changed, or because the run was interrupted and resumed at another commit.

A folder appears complete or not at all: until then everything is in the hidden folder `.<name>.partial` beside it, with
the ledger from which an interrupted run resumes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from numbers import Number
from operator import itemgetter
from pathlib import Path

import yaml

from eval.errors import UserError, one_line
from eval.generate.ledger import Answer, Failure, ledger_files
from eval.runs import environment
from eval.runs.digests import asked
from eval.runs.settings import RunSettings, fingerprint
from eval.runs.stats import bootstrap_ci

SCHEMA = 1
_NEEDED_BYTES = 64 << 20
LEDGER = "ledger.jsonl"
STARTED = "started.jsonl"


class RunFolder:
    """Where one run's results go.

    Attributes:
        path: the finished folder.
        partial: the hidden folder of an unfinished run.
    """

    def __init__(self, results_dir: Path, run_id: str) -> None:
        self.path = results_dir / "runs" / run_id
        self.partial = self.path.with_name(f".{run_id}.partial")

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").is_file()

    def metrics(self) -> dict:
        """metrics.json of a finished run.

        Raises:
            UserError: it is damaged; the message names the folder.
        """
        return self._whole("metrics.json", json.loads)

    def check(self) -> None:
        """Check that a finished run is whole, before it is reported as there.

        Raises:
            UserError: a file is missing or damaged, or there are more or fewer samples than metrics.json says.
        """
        self._whole("config.yaml", yaml.safe_load)
        lines = self._whole("samples.jsonl", lambda text: {"n": len([json.loads(line) for line in text.splitlines()])})
        n = self.metrics().get("n")
        if lines["n"] != n:
            raise self._damaged(f"metrics.json speaks of {n} questions, samples.jsonl has {lines['n']}")

    def _whole(self, name: str, read: Callable[[str], object]) -> dict:
        try:
            content = read((self.path / name).read_text(encoding="utf-8"))
        except (ValueError, OSError, yaml.YAMLError) as error:
            raise self._damaged(f"{name} cannot be read ({one_line(error)})") from error
        if not isinstance(content, dict):
            raise self._damaged(f"{name} cannot be read (it holds no keys)")
        return content

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged: {reason}. Move it away, and use the same command to run it again")

    @property
    def ledger(self) -> Path:
        return self.partial / LEDGER

    @property
    def judged(self) -> Path:
        """Replies of the judge of an unfinished run."""
        return self.partial / "judge.jsonl"

    def answers_kept(self) -> int:
        """How many answers an unfinished run has on disk."""
        lines = [line for path in ledger_files(self.ledger) for line in path.read_bytes().splitlines(keepends=True)]
        return sum(line.endswith(b"\n") and b'"error": ' not in line for line in lines)

    def git(self) -> dict | None:
        """Commit and state of the code that worked on an unfinished run, as metrics.json has it.

        Every process that opened the folder noted what it started with. The commit is this process's; "dirty" is true
        if it had changes, or if the notes of the others differ. None outside a checkout.
        """
        now = environment.git_at_start()
        notes = (self.partial / STARTED).read_text(encoding="utf-8").splitlines()
        return now and {**now, "dirty": now["dirty"] or any(note != json.dumps(now) for note in notes)}

    def excluded(self) -> int:
        """How many questions a finished run leaves out."""
        return self.metrics().get("excluded", 0)

    def not_scored(self) -> dict[str, str]:
        """Metrics that a finished run lacks because no language model judged -> why."""
        return self.metrics().get("not_scored", {})

    def open(self) -> None:
        """Make the partial folder and see that results can be written, before hours are spent on them.

        Raises:
            UserError: no permission, no space, or something else is in the folder's place.
        """
        runs = self.path.parent
        if self.path.exists():
            raise UserError(f"{self.path} exists and is not a finished run; move it away")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.partial), tempfile.TemporaryFile(dir=runs):
                free = shutil.disk_usage(self.partial).free
            with open(self.partial / STARTED, "a", encoding="utf-8") as file:
                file.write(json.dumps(environment.git_at_start()) + "\n")
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise UserError(f"cannot write results to {runs}: {reason}; set results_dir to a folder you own") from error
        if free < _NEEDED_BYTES:
            raise UserError(f"only {free >> 20} MB are free in {runs}; make room or set results_dir to another disk")

    def publish(self, files: Mapping[str, str], keep_answers: bool = False) -> None:
        """Write the files and give the folder its name, in one step; `keep_answers`: with the ledger in it."""
        for name, content in files.items():
            with open(self.partial / name, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.rename(self.partial, self.path)  # fails if a folder came there meanwhile: nothing is overwritten
        for path in () if keep_answers else (*ledger_files(self.path / LEDGER), self.path / STARTED):
            path.unlink(missing_ok=True)


def run_files(
    config: Mapping, metrics: Mapping, samples: Iterable[Mapping], command: str, git: Mapping | None
) -> dict[str, str]:
    """Return the four files that every run folder has, of whatever kind.

    Args:
        config: for config.yaml.
        metrics: for metrics.json; schema, versions, hardware, git and date are added.
        samples: the lines of samples.jsonl.
        command: how the run was started.
        git: code that made it, see :meth:`RunFolder.git`.
    """
    about = {"versions": environment.versions(), "hardware": environment.hardware(), "git": git}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    plain = json.loads(json.dumps(config))  # tuples -> lists
    return {
        "config.yaml": yaml.safe_dump(plain, sort_keys=False),
        "samples.jsonl": "".join(map(_line, samples)),
        "env.json": _json({"command": command, **about, "packages": environment.packages()}),
        "metrics.json": _json({"schema": SCHEMA, **metrics, **about}),
    }


def files(
    run: RunSettings,
    samples: Sequence[Mapping],
    aggregated: Mapping,
    answers: Sequence[Answer],
    excluded: Sequence[Failure],
    command: str,
    benchmark: Mapping | None = None,
    not_scored: Mapping[str, str] | None = None,
    git: Mapping | None = None,
) -> dict[str, str]:
    """Return the files of an accuracy run.

    Args:
        samples: lmms-eval's sample records, one per question.
        aggregated: results of the task, "<metric>,<filter>" -> value, the headline first.
        answers: in the order of the samples.
        excluded: questions that could not be answered.
        benchmark: what was asked, see `eval.tasks.loading.Loaded.about`.
        not_scored: metrics that are missing -> why.
        git: code that made it, see :meth:`RunFolder.git`.
    """
    types = {str(s["doc"].get("question_type")) for s in samples}
    found = {_typed(k, types): _summary(k, value, samples) for k, value in _metrics(aggregated).items()}
    seconds = sum(a.seconds for a in answers)
    metrics = {
        "task": run.task.name,
        "model": run.model.name,
        "method": run.method.name,
        "options": run.options,
        "budget": run.budget,
        "config_hash": run.config_hash(),
        "answers_hash": run.answers_hash(),
        "asked": asked(run),
        "weights": fingerprint(run.checkpoint),
        "n": len(samples),
        "excluded": len(excluded),
        "metrics": found,
        **({"not_scored": dict(not_scored)} if not_scored else {}),
        "benchmark": benchmark,
        "tokens": _tokens(run, answers),
        **({} if run.axes == 1 else {"positions": "original"}),
        "time": {
            "generate_s": seconds,
            "samples_per_s": len(answers) / seconds,
            "note": f"throughput of the evaluation in batches of at most {run.batch_size}, pictures and prompts "
            "included (also where several runs shared them); a picture that comes again may be encoded only once; "
            "it is not latency",
        },
        "cost": cost(run, answers),
        "seed": run.task.seed,
    }
    lines = [_sample_line(s, a, found) for s, a in zip(samples, answers, strict=True)]
    left_out = [{"doc_id": f.doc_id, "question": f.prompt, "error": f.error} for f in excluded]
    return {
        **({"excluded.jsonl": "".join(map(_line, left_out))} if left_out else {}),
        **run_files(_configuration(run), metrics, lines, command, git),
    }


def _tokens(run: RunSettings, answers: Sequence[Answer]) -> dict:
    """Means over the questions; where the number depends on the picture also how many had fewer than the budget."""
    found = {k: statistics.fmean(getattr(a, k) for a in answers) for k in ("visual", "entering", "leaving")}
    if run.n_visual is None and isinstance(run.budget, int):
        found["clamped"] = sum(0 < a.visual < run.budget for a in answers)
    return found


def cost(run: RunSettings, answers: Sequence[Answer]) -> dict:
    """GMACs (1 MAC = 2 FLOPs) of one question with the median number of text tokens, at batch 1.

    `prefill_gmacs` are the language model's with the method's own (`method_gmacs`), wherever it does its work;
    `first_token_gmacs` those with the tower's and the projector's, null where these depend on the picture: there a
    prompt has the median number of `visual_tokens`. See `sparsevlm.cost.flops`.
    """
    from sparsevlm.cost.flops import count, first_token_gmacs, prefill_gmacs

    text = statistics.median_low(a.input_tokens - a.visual for a in answers)
    if not any(a.visual for a in answers):
        return {"text_tokens": text, "note": "questions without pictures"}
    parts = {
        "prefill_gmacs": prefill_gmacs,
        **{f"{name}_gmacs": itemgetter(name) for name in ("method", "vision", "projector")},
        "first_token_gmacs": first_token_gmacs,
        "decode_gmacs_per_token": itemgetter("decode"),
    }
    budget = None if run.budget == "explicit" else run.budget
    dynamic = {}
    if run.n_visual is None:  # the language model alone, on a prompt of median length
        parts |= dict.fromkeys(("vision_gmacs", "projector_gmacs", "first_token_gmacs"), lambda counted: None)
        dynamic = {"visual_tokens": max(1, int(statistics.median(a.visual for a in answers)))}
    try:
        counted = count(str(run.checkpoint), run.method.name, budget, text, **dynamic, **run.options)
    except ValueError as error:  # kept counts that depend on the picture
        return {"text_tokens": text, **dict.fromkeys(parts), "note": one_line(error)}
    return {"text_tokens": text, **dynamic, **{key: part(counted) for key, part in parts.items()}}


def _metrics(aggregated: Mapping) -> dict[str, float]:
    """lmms-eval's "<metric>,<filter>" -> value, without its standard errors."""
    return {
        key.split(",")[0]: value
        for key, value in aggregated.items()
        if "," in key and isinstance(value, Number) and not key.split(",")[0].endswith(("_stderr", "_stderr_clt"))
    }


def _summary(name: str, value: float, samples: Sequence[Mapping]) -> dict:
    """A metric with its interval, if it is the mean of a number per question."""
    scores = [s[name] for s in samples if name in s]
    if scores and all(isinstance(x, Number) for x in scores):
        mean, low, high = bootstrap_ci(scores)
        if abs(mean - value) < 1e-9:
            return {"value": value, "ci95": [low, high], "n": len(scores)}
    return {"value": value, "ci95": None, "n": len(scores)}


def _typed(name: str, question_types: set[str]) -> str:
    """accuracy_beside -> accuracy/beside, if beside is a type of question."""
    metric, _, kind = name.partition("_")
    return f"{metric}/{kind}" if kind in question_types else name


def _sample_line(sample: Mapping, answer: Answer, metrics: Mapping) -> dict:
    line = {
        "doc_id": sample["doc_id"],
        "question": answer.prompt,
        "question_type": sample["doc"].get("question_type"),
        "target": sample["target"],
        "answer": answer.text,
        "scores": {m: sample[m] for m in metrics if isinstance(sample.get(m), Number)},
    }
    rest = ("input_tokens", "output_tokens", "visual", "entering", "leaving", "seconds")
    return {**line, **{k: getattr(answer, k) for k in rest}, **answer.notes}


def _line(content: Mapping) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _configuration(run: RunSettings) -> dict:
    """In the shape of configs/config.yaml, so that every key can be given on the command line again."""
    return {
        "model": asdict(run.model),
        "method": {"name": run.method.name, **run.options},
        "budget": None if run.budget == "explicit" else run.budget,
        "task": run.task.plain(),
        "limit": run.limit,
        "max_new_tokens": run.max_new_tokens,
        "batch_size": run.batch_size,
        "on_error": run.on_error,
        "feature_mb": run.feature_mb,
    }


def _json(content: Mapping) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
