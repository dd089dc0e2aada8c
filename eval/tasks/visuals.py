"""Pictures and videos of a question, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from PIL import ImageFile

from sparsevlm.models.videos import SUFFIXES

_ID_COLUMNS = ("question_id", "index", "id", "qid", "image_id", "video_name", "video")


@contextmanager
def whole_pictures() -> Iterator[None]:
    """lmms-eval makes Pillow fill up truncated files with grey: half a picture would pass for a whole one."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def visuals(request, documents: Mapping) -> tuple[list, list]:
    """What a request shows.

    Args:
        request: one of lmms-eval's, of its `simple` kind.
        documents: task -> split -> documents.

    Returns:
        (pictures, videos), in the task's order; a video is a file, or its frames uint8 ``[T, H, W, 3]``.

    Raises:
        ValueError: a picture is damaged or a video missing; the message names the question.
    """
    _, _, doc_to_visual, doc_id, task, split = request.args
    try:
        with whole_pictures():
            found = doc_to_visual(documents[task][split][doc_id]) or []
    except (Exception, SystemExit) as error:  # some tasks end the process when a video is missing
        name = name_of(documents[task][split], doc_id)
        raise ValueError(f"the picture or video of {name} cannot be read ({type(error).__name__}: {error})") from error
    return [v for v in found if not _is_video(v)], [v for v in found if _is_video(v)]


def _is_video(visual) -> bool:
    if isinstance(visual, np.ndarray):
        return visual.ndim == 4
    return isinstance(visual, str) and visual.lower().endswith(SUFFIXES)


def name_of(documents, doc_id: int) -> str:
    """A question's name in its data, read without its picture."""
    for column in _ID_COLUMNS:
        if column in getattr(documents, "column_names", ()):
            return f"{column} {documents.select_columns([column])[doc_id][column]}"
    return f"row {doc_id}"
