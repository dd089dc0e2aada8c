"""Pictures and videos as they come from users and datasets, made uniform; what cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from sparsevlm.models.videos import SUFFIXES, read_frames, uniform

#: Longest side over shortest; beyond it, scaling the shortest side to the model's size would take gigabytes.
MAX_ASPECT_RATIO = 200


def open_image(image: Image.Image | np.ndarray | str | Path, label: str) -> Image.Image:
    """An RGB picture, decoded.

    Args:
        image: a PIL image, a file, or an array [H, W, 3] uint8.
        label: what to call it in an error, such as "image 0 of question 3".

    Raises:
        ValueError: it cannot be decoded, is empty, or is of another kind; the message names it.
    """
    source = image if isinstance(image, (str, Path)) else getattr(image, "filename", "")
    label += f" ({source})" if source else ""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise ValueError(f"{label} must be an array [H, W, 3] of uint8, not {list(image.shape)} of {image.dtype}")
        if image.size == 0:
            raise ValueError(f"{label} is empty: its shape is {list(image.shape)}")
        image = Image.fromarray(image)
    elif isinstance(image, (str, Path)):
        try:
            image = Image.open(image)
        except Exception as error:
            raise ValueError(f"{label} cannot be opened ({error}); replace the file or leave the sample out") from error
    elif not isinstance(image, Image.Image):
        raise ValueError(f"{label} must be a PIL image, a file or an array [H, W, 3], not {type(image).__name__}")
    if min(image.size) == 0 or max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"{label} is {image.width} x {image.height} pixels; the sides must not be 0 nor differ by more than a "
            f"factor of {MAX_ASPECT_RATIO}; replace the picture or leave the sample out"
        )
    # lmms-eval makes Pillow fill up truncated files with grey: half a picture would pass for a whole one
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error ... depending on the format
        raise ValueError(f"{label} cannot be decoded ({error}); replace the file or leave the sample out") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def is_video(video) -> bool:
    """Whether this is one video: a file, an array [T, H, W, 3] or a list of frames (rather than a list of videos).

    Files in a list are frames unless their names end as those of videos do.
    """
    if isinstance(video, (str, Path)):
        return True
    if isinstance(video, (list, tuple)):
        first = video[0] if video else None
        nested = isinstance(first, (list, tuple)) or (
            isinstance(first, (str, Path)) and Path(first).suffix.lower() in SUFFIXES
        )
        return first is not None and not nested and getattr(first, "ndim", 3) == 3
    return getattr(video, "ndim", 0) == 4


def sample_frames(video: np.ndarray | list | str | Path, frames: int, label: str) -> list[Image.Image]:
    """`frames` RGB pictures: evenly spaced ones, first and last included, see :func:`uniform`.

    Args:
        video: an array [T, H, W, 3] uint8, a list of frames, or a file.

    Raises:
        ValueError: a video without frames, a file that cannot be read to its end, or a frame that cannot be used.
    """
    if isinstance(video, (str, Path)):
        try:
            return [Image.fromarray(frame) for frame in read_frames(video, frames)]
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    count = len(video)
    if count == 0:
        raise ValueError(f"{label} has no frames; replace the file or leave the sample out")
    return [open_image(video[i], f"frame {i} of {label}") for i in uniform(count, frames)]
