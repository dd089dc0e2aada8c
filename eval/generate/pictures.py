"""Pictures decoded once and scaled once, however many questions are asked about them.

Benchmarks ask several questions about a picture (POPE 18, GQA 32), and each row of their data holds the file anew.
Files are recognised by their bytes, pictures by their pixels: what comes out is what doing it again would give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from torch import Tensor

from eval.generate.lru import LeastRecentlyUsed
from sparsevlm.models import Processor

DECODED_BYTES = 256 << 20


class Documents:
    """Rows of a dataset as `dataset[i]` gives them, with picture files that stand in several rows decoded once.

    Args:
        dataset: its columns of type `Image` are decoded here, all others by itself.
    """

    def __init__(self, dataset: Dataset, decoded: LeastRecentlyUsed) -> None:
        self._columns = {name: f for name, f in dataset.features.items() if isinstance(f, ImageColumn) and f.decode}
        self._files = dataset
        for name, column in self._columns.items():
            self._files = self._files.cast_column(name, ImageColumn(mode=column.mode, decode=False))
        self._decoded = decoded

    def __getitem__(self, index: int) -> dict:
        row = self._files[index]
        for name, column in self._columns.items():
            if row[name] is not None:
                row[name] = self._picture(row[name], column)
        return row

    def __getattr__(self, name: str):
        return getattr(self._files, name)

    def _picture(self, file: dict, column: ImageColumn) -> Image.Image:
        content = file.get("bytes")
        if content is None:
            return column.decode_example(file)
        key = hashlib.blake2b(content, digest_size=16).digest(), column.mode
        picture = self._decoded.get(key)
        if picture is None:
            picture = column.decode_example(file)
            self._decoded.put(key, picture, picture.width * picture.height * len(picture.getbands()))
        return picture.copy()  # a task may change what it gets


def decoded_once(documents):
    """Return `documents` of a split such that picture files are decoded once; other kinds as they are."""
    return Documents(documents, LeastRecentlyUsed(DECODED_BYTES)) if isinstance(documents, Dataset) else documents


class PixelsOnce:
    """An image processor that remembers the pixels of pictures seen before; all else is the processor's own.

    Args:
        image_processor: makes one row of `pixel_values` of each picture, whatever pictures stand beside it.
        max_bytes: how much to keep in main memory.
    """

    def __init__(self, image_processor: Callable, max_bytes: int) -> None:
        self.image_processor, self.kept = image_processor, LeastRecentlyUsed(max_bytes)

    def __call__(self, pictures: Sequence[Image.Image], **options) -> dict[str, Tensor]:
        """`pixel_values` [N, 3, H, W] of N pictures, as the image processor makes them."""
        return {"pixel_values": torch.cat([self._one(picture, options) for picture in pictures])}

    def __getattr__(self, name: str):
        return getattr(self.image_processor, name)

    def _one(self, picture: Image.Image, options: dict) -> Tensor:
        key = hashlib.blake2b(picture.tobytes(), digest_size=16).digest(), picture.size, picture.mode
        pixels = self.kept.get(key)
        if pixels is None:
            pixels = self.image_processor([picture], **options)["pixel_values"]
            self.kept.put(key, pixels, pixels.nbytes)
        return pixels


def remember_pixels(processor: Processor, max_bytes: int) -> None:
    """Let a processor of LLaVA or Video-LLaVA remember the pixels of `max_bytes` of pictures."""
    made = getattr(processor, "image_processor", None)
    if type(processor) is Processor and not isinstance(made, PixelsOnce):
        processor.image_processor = PixelsOnce(made, max_bytes)
