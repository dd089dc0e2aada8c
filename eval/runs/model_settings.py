"""The config group `model`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSettings:
    """Config group `model`. All but `name` are keywords of `sparsevlm.load`; `device` may also be "auto"."""

    name: str
    pretrained: str
    revision: str | None
    dtype: str | None
    device: str
    attn_implementation: str
    prompt: str
    image_aspect_ratio: str
    min_pixels: int | None
    max_pixels: int | None
