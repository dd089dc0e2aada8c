"""The questions of TGIF-QA, MSVD-QA and MSRVTT-QA as Video-LLaVA's authors give them out (GPT_Zero_Shot_QA).

A folder such as MSVD_Zero_Shot_QA holds `test_q.json` (video_name, question_id, question), `test_a.json` (question_id,
answer, type) and the videos, in itself or a folder below it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from eval.tasks.folders import FOLDER, hf_home
from sparsevlm.models.videos import SUFFIXES

FOLDERS = {"tgif": "TGIF_Zero_Shot_QA", "msvd": "MSVD_Zero_Shot_QA", "msrvtt": "MSRVTT_Zero_Shot_QA"}


def default_folder(name: str) -> Path:
    """Where the data are looked for: beside the videos that lmms-eval downloads."""
    return hf_home() / "GPT_Zero_Shot_QA" / FOLDERS[name]


def rows(folder: Path, limit: int | None = None) -> list[dict]:
    """Questions, answers and the files of their videos, in the order of test_q.json.

    Args:
        limit: the first N only; only their videos have to be there.

    Raises:
        FileNotFoundError: the folder, a file of questions or answers, or videos are missing; the message names them.
        ValueError: a damaged file, or a question without an answer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; set task.data to the folder of test_q.json and the videos"
        )
    questions = _read(folder / "test_q.json")[:limit]
    answers = {str(a["question_id"]): a for a in _read(folder / "test_a.json")}
    unanswered = [q["question_id"] for q in questions if str(q["question_id"]) not in answers]
    if unanswered:
        raise ValueError(
            f"{folder / 'test_a.json'} lacks the answers to {len(unanswered)} questions: {unanswered[0]}, ..."
        )
    files = {p.stem: p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES}
    missing = sorted({q["video_name"] for q in questions} - {n for n in files})
    missing = [n for n in missing if Path(n).stem not in files]
    if missing:
        raise FileNotFoundError(f"{len(missing)} videos are missing under {folder}, for example {missing[0]}")
    made = []
    for q in questions:
        answer = answers[str(q["question_id"])]
        name = q["video_name"]
        made.append(
            {
                "video": str((files.get(name) or files[Path(name).stem]).resolve()),
                "video_name": name,
                "question_id": str(q["question_id"]),
                "question": q["question"],
                "answer": str(answer["answer"]),
                "type": str(answer.get("type", "")),
            }
        )
    return made


def keep(rows: list[dict], folder: Path, name: str) -> Path:
    """As a JSON file in `folder`, named by its content."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / f"{name}-{digest}.json"
    return target if target.is_file() else write(rows, target)


def write(rows: list[dict], target: Path) -> Path:
    """As the JSON file that the YAMLs read; complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".", suffix=".json", dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False)
    os.replace(draft, target)
    return target


def default_file(name: str) -> Path:
    """Where the YAML of a task looks under lmms-eval's own command line."""
    return FOLDER / "video_qa" / "data" / f"{name}.json"


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; it is part of the authors' GPT_Zero_Shot_QA files")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
