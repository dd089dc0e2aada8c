"""Frames of a video -> pixels, as Video-LLaVA was trained and is evaluated by its authors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def clip_pixels(frames: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise, scale the shorter side to `size`, and cut out the middle square, in this order.

    Source: videollava/model/multimodal_encoder/languagebind/video/processing_video.py:get_video_transform of
    PKU-YuanGroup/Video-LLaVA (984e65b), which scales with pytorchvideo's `short_side_scale`: bilinear without
    antialiasing, the longer side rounded down. The processor on the model hub scales by an antialiased bicubic filter,
    as for pictures, and before it normalises; the same frame then differs by up to several tenths.

    Not followed: the authors' transform ends with a random horizontal flip (p = 0.5), which they leave on when they
    evaluate. Here no frame is flipped, so that a video gives the same answer every time.

    Args:
        frames: RGB, not necessarily of one size.
        size: side of the square in pixels.
        mean, std: of each channel, of values from 0 to 1.

    Returns:
        float32 [frames, 3, size, size].
    """
    low, scale = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    out = []
    for frame in frames:
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 255.0
        pixels = (pixels - low) / scale
        height, width = pixels.shape[1:]
        if width < height:
            scaled = int(height / width * size), size
        else:
            scaled = size, int(width / height * size)
        pixels = interpolate(pixels[None], size=scaled, mode="bilinear", align_corners=False)[0]
        top, left = (round((side - size) / 2) for side in scaled)
        out.append(pixels[:, top : top + size, left : left + size])
    return torch.stack(out)
