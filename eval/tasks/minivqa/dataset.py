"""Builds the data of the task minivqa: questions over generated test scenes, as a parquet file.

Use it with lmms-eval by overriding where the task finds its data::

    from eval.tasks.minivqa.dataset import build_dataset, task_override

    folder = build_dataset(seed=0, n=2000, cache_dir=cache_dir)
    lmms_eval.evaluator.simple_evaluate(
        model=lm,                                # a "simple" model (lm.is_simple is True), as every dict task needs
        tasks=[task_override(folder)],
        task_manager=TaskManager(include_path="eval/tasks/minivqa", include_defaults=False, model_name=...),
    )

lmms-eval's own command line (``--include_path eval/tasks/minivqa --tasks minivqa``) takes no override; it finds the
default data after ``python -m eval.tasks.minivqa``.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sparsevlm.mini import questions
from sparsevlm.mini.scenes import SceneGenerator

DEFAULT_SEED = 0
DEFAULT_N = 2000
#: Raise when the same seed would give other rows than before: files of the older version are then left alone.
VERSION = 3
FILE_NAME = "test.parquet"
#: Where the YAML looks when nothing is overridden (ignored by git).
DEFAULT_DIR = Path(__file__).parent / "data"
_STREAM = 0x4D51  # keeps the task's random streams apart from the training's


def rows(seed: int, n: int) -> Iterator[dict]:
    """The first ``n`` questions of a seed, one picture each.

    Question ``i`` has type ``TYPES[i % 9]``, so any first N are balanced over the types (to within one), and depends on
    ``seed`` and ``i`` alone, so a smaller set is the beginning of a larger one. The digits are those of the test split.

    Yields:
        ``question_id`` (int), ``image`` (``{"bytes": PNG of 168 x 168, "path": None}``), ``question``, ``answer``,
        ``question_type`` (str), ``target_patches`` (list of int: row-major indices on the 24 x 24 grid of the patches
        that the objects deciding the answer cover).
    """
    drawn = draw_questions(SceneGenerator("test"), questions, _STREAM, seed, n)
    for i, (scene, question, text) in enumerate(drawn):
        picture, patches = as_png(scene.image), scene.patches_of(question.targets)
        yield {"question_id": i, "image": picture, **text, "target_patches": patches}


def draw_questions(generator, asked, stream: int, seed: int, n: int) -> Iterator[tuple]:
    """The first ``n`` questions of a seed, the types of question in turn.

    Args:
        generator: ``draw(rng)`` gives a scene or clip, with ``objects``.
        asked: the module with ``TYPES`` and ``candidates(objects, rng)``.
        stream: keeps the random streams of a task apart from others.
        seed: which set of questions.
        n: how many.

    Yields:
        The scene or clip, the :class:`~sparsevlm.mini.questions.Question`, and its columns of text.
    """
    for i in range(n):
        rng = np.random.RandomState([stream, seed, i])
        type_ = asked.TYPES[i % len(asked.TYPES)]
        found: list[questions.Question] = []
        while not found:
            scene = generator.draw(rng)
            found = asked.candidates(scene.objects, rng)[type_]
        question = found[rng.randint(len(found))]
        text = {"question": question.text, "answer": question.answer_text, "question_type": question.type}
        yield scene, question, text


def as_png(image: np.ndarray) -> dict:
    """A picture, uint8 ``[H, W, 3]``, as ``datasets`` stores it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def build_dataset(seed: int = DEFAULT_SEED, n: int = DEFAULT_N, cache_dir: str | Path = DEFAULT_DIR) -> Path:
    """Writes the questions of :func:`rows` to ``<cache_dir>/v<VERSION>-seed<seed>-n<n>/test.parquet``.

    The file appears complete or not at all; one that is there already is used as it is.

    Args:
        seed: which set of test scenes, 0 or more; equal seeds give equal rows.
        n: number of questions, 1 or more.
        cache_dir: where the folder goes; made if missing.

    Returns:
        The folder that holds ``test.parquet``.

    Raises:
        ValueError: ``seed`` or ``n`` out of range.
        OSError: the folder cannot be written.
    """
    from datasets import Image as ImageFeature
    from datasets import List, Value

    folder = Path(cache_dir) / f"v{VERSION}-seed{seed}-n{n}"
    columns = {"image": ImageFeature(), "target_patches": List(Value("int32"))}
    return write_questions("minivqa", folder, rows, columns, seed, n)


def write_questions(task: str, folder: Path, rows: Callable, columns: dict, seed: int, n: int) -> Path:
    """Writes ``rows(seed, n)`` to ``folder/test.parquet``, complete or not at all; a file that is there is kept.

    Args:
        task: for messages.
        folder: made if missing.
        rows: gives dicts with ``question_id``, ``question``, ``answer``, ``question_type`` and the ``columns``.
        columns: the ``datasets`` features of the other columns.
        seed: which set of questions, 0 or more.
        n: number of questions, 1 or more.

    Returns:
        ``folder``.

    Raises:
        ValueError: ``seed`` or ``n`` out of range.
        OSError: the folder cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"{task}: the seed must be between 0 and 2**32 - 1, got {seed}")
    if n < 1:
        raise ValueError(f"{task}: the number of questions must be at least 1, got {n}")
    target = folder / FILE_NAME
    if target.is_file():
        return folder
    from datasets import Dataset, Features, Value

    text = {name: Value("string") for name in ("question", "answer", "question_type")}
    features = Features(question_id=Value("int64"), **text, **columns)
    folder.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(list(rows(seed, n)), features=features)
    handle, draft = tempfile.mkstemp(prefix=".", suffix=".parquet", dir=folder)
    os.close(handle)
    try:
        data.to_parquet(draft, batch_size=100)
        os.chmod(draft, 0o644)
        os.replace(draft, target)
    finally:
        Path(draft).unlink(missing_ok=True)
    return folder


def task_override(folder: str | Path, task: str = "minivqa") -> dict:
    """The entry for lmms-eval's ``tasks=[...]`` that runs a task on the data in ``folder`` (of its ``build_dataset``).

    Raises:
        FileNotFoundError: no data there.
    """
    file = Path(folder).resolve() / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{task}: no {file}; call build_dataset first")
    return {"task": task, "dataset_kwargs": {"data_files": {"test": str(file)}}}
