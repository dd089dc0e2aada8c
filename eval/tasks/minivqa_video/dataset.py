"""Builds the data of the task minivqa_video: questions over generated test clips, as a parquet file.

See :mod:`eval.tasks.minivqa.dataset` for its use.
"""

from collections.abc import Iterator
from pathlib import Path

from eval.tasks.minivqa import dataset as pictures
from sparsevlm.mini import clip_questions
from sparsevlm.mini.clips import ClipGenerator

DEFAULT_N = 2000
#: Raise when the same seed would give other rows than before.
VERSION = 1
DEFAULT_DIR = Path(__file__).parent / "data"
_STREAM = 0x4D56  # keeps the task's random streams apart from the training's


def rows(seed: int, n: int) -> Iterator[dict]:
    """The first ``n`` questions of a seed, one clip each.

    Question ``i`` has type ``TYPES[i % 6]`` and depends on ``seed`` and ``i`` alone. The digits are those of the test
    split.

    Yields:
        ``question_id`` (int), ``frames`` (8 times ``{"bytes": PNG of 56 x 56, "path": None}``), ``question``,
        ``answer``, ``question_type`` (str), ``target_tokens`` (list of int, 0 to 519: the visual tokens, 65 per frame,
        that the objects deciding the answer cover).
    """
    drawn = pictures.draw_questions(ClipGenerator("test"), clip_questions, _STREAM, seed, n)
    for i, (clip, question, text) in enumerate(drawn):
        frames, tokens = [pictures.as_png(frame) for frame in clip.frames], clip.tokens_of(question.targets)
        yield {"question_id": i, "frames": frames, **text, "target_tokens": tokens}


def build_dataset(seed: int = 0, n: int = DEFAULT_N, cache_dir: str | Path = DEFAULT_DIR) -> Path:
    """As :func:`eval.tasks.minivqa.dataset.build_dataset`, of :func:`rows`."""
    from datasets import Image as ImageFeature
    from datasets import List, Value

    folder = Path(cache_dir) / f"v{VERSION}-seed{seed}-n{n}"
    columns = {"frames": List(ImageFeature()), "target_tokens": List(Value("int32"))}
    return pictures.write_questions("minivqa_video", folder, rows, columns, seed, n)
