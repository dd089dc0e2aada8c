"""Recorded rows laid out as the hub has them, so that a benchmark is loaded, asked and scored as in a run."""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmms_eval.api.model import lmms

from eval.generate.generator import clean, generation_arguments
from eval.tasks.video_qa.data import FOLDERS
from tests.eval.tasks.hub_cache import IMAGE, NUMBER, TEXT, picture, write_dataset

_ORG = "lmms-lab-encoder"
#: benchmark -> (repository, configuration, split, columns besides those of the recorded rows)
_PLACES = {
    "gqa": (f"{_ORG}/GQA", "testdev_balanced_instructions", "testdev", {"imageId": TEXT}),
    "textvqa": (f"{_ORG}/textvqa", None, "validation", {"image": IMAGE}),
    "vqav2": (f"{_ORG}/VQAv2", None, "validation", {"image": IMAGE}),
    "pope": (f"{_ORG}/POPE", None, "test", {"image": IMAGE, "question_id": TEXT}),
    "scienceqa": (f"{_ORG}/ScienceQA", "ScienceQA-IMG", "test", {"image": IMAGE}),
    "seedbench": (f"{_ORG}/SEED-Bench", None, "test", {"image": [IMAGE]}),
    "mmbench": (
        f"{_ORG}/MMBench", "en", "dev",
        {"image": IMAGE, "category": TEXT, "L2-category": TEXT, "source": TEXT, "split": TEXT},
    ),
    "mme": (f"{_ORG}/MME", None, "test", {"image": IMAGE}),
    "mmvet": (f"{_ORG}/MMVet", None, "test", {"image": IMAGE}),
}  # fmt: skip
_LISTS = {"answers": [TEXT], "choices": [TEXT], "ocr_tokens": [TEXT], "segment": [NUMBER]}


def write(home: Path, benchmark: str, rows: Sequence[Mapping]) -> None:
    """Write the rows of a benchmark below `home`, to be used as HF_HOME."""
    if benchmark not in _PLACES:
        return _write_videos(home, benchmark, rows)
    repository, config, split, more = _PLACES[benchmark]
    documents = []
    for row in rows:
        doc = dict(row["doc"])
        if benchmark == "vqav2":
            doc["answers"] = [
                {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(doc["answers"])
            ]
        for name, kind in more.items():
            doc[name] = "x" if kind == TEXT else [picture(0)] if isinstance(kind, list) else picture(0)
        documents.append(doc)
    schema = {name: _kind(benchmark, name, value) for name, value in documents[0].items() if name not in more} | more
    write_dataset(home, repository, config, {split: documents}, schema)
    if benchmark == "gqa":
        pictures = {"testdev": [{"id": "x", "image": picture(0)}]}
        write_dataset(home, repository, "testdev_balanced_images", pictures, {"id": TEXT, "image": IMAGE})


def _kind(benchmark: str, name: str, value):
    if benchmark == "vqav2" and name == "answers":
        return [{"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}]
    return _LISTS.get(name, NUMBER if isinstance(value, int) else TEXT)


def _write_videos(home: Path, benchmark: str, rows: Sequence[Mapping]) -> None:
    """The authors' files; the videos are empty, for a model that does not look."""
    folder = home / "GPT_Zero_Shot_QA" / FOLDERS.get(benchmark, "Activitynet_Zero_Shot_QA")
    docs = [row["doc"] for row in rows]
    for directory, name in ((folder, "{}.mp4"), (home / "activitynetqa" / "all_test", "v_{}.mp4")):
        directory.mkdir(parents=True, exist_ok=True)
        for doc in docs:
            (directory / name.format(doc["video_name"])).touch()
    for file, keys in (
        ("test_q.json", ("video_name", "question_id", "question")),
        ("test_a.json", ("question_id", "answer", "type")),
    ):
        (folder / file).write_text(json.dumps([{key: doc[key] for key in keys} for doc in docs]))
    if benchmark not in FOLDERS:
        write_dataset(home, "lmms-eval/ActivityNetQA", None, {"test": docs}, dict.fromkeys(docs[0], TEXT))


class Recorded(lmms):
    """Says what was recorded: what `generate` returned, treated as an answer is treated in a run.

    Args:
        rows: recordings.
        benchmarks: lmms-eval's name of a task -> benchmark.

    Attributes:
        texts: (benchmark, key of the row) -> what was kept of the answer.
    """

    is_simple = True

    def __init__(self, rows: Sequence[Mapping], benchmarks: Mapping[str, str]) -> None:
        super().__init__()
        self.benchmarks = benchmarks
        self.said = {(row["benchmark"], key(row["doc"])): row["answer"] for row in rows}
        self.texts: dict[tuple, str] = {}

    def generate_until(self, requests) -> list[str]:
        out = []
        for request in requests:
            _, gen_kwargs, _, doc_id, task, split = request.args
            row = self.benchmarks[task], key(self.task_dict[task][split][doc_id])
            _, until = generation_arguments(gen_kwargs, 128)
            self.texts[row] = text = clean(self.said[row], until)
            out.append(text)
        return out

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


def key(doc: Mapping) -> tuple:
    """What tells the rows of a benchmark apart; columns that were filled up do not."""
    found = (doc.get(name) for name in ("question_id", "index", "question", "category", "data_id"))
    return tuple(None if value == "x" else value for value in found)
