"""Which visual tokens survive each pruning layer, drawn over the picture as the model sees it.

python scripts/draw_kept.py picture.png "what digit is red ?" --budget 64 --output kept.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from scripts import style

_VEIL = 0.75  # how far a dropped patch fades towards white
_EDGE = to_rgb("#D55E00")


def seen_pixels(pixel_values: torch.Tensor, image_processor) -> np.ndarray:
    """The picture as the model sees it: resized, cropped or padded, with the normalisation undone.

    Args:
        pixel_values: [3, H, W] float, one picture as the processor made it.
        image_processor: has `image_mean` and `image_std` (3 floats each).

    Returns:
        [H, W, 3] float in 0 ... 1.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return (pixel_values.cpu().float() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def draw_patches(ax: Axes, pixels: np.ndarray, kept: Sequence[int], grid: int) -> None:
    """Draw a picture in which only the kept patches show; the others fade, and each kept region has an outline.

    Args:
        ax: where to draw.
        pixels: [H, W, 3] float in 0 ... 1.
        kept: row-major indices of the kept patches.
        grid: patches per side.
    """
    mask = np.zeros(grid * grid, bool)
    mask[np.asarray(kept, int)] = True
    mask = mask.reshape(grid, grid)
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) * grid // height, np.arange(width) * grid // width
    shown = mask[rows][:, columns, None]
    ax.imshow(np.where(shown, pixels, (1 - _VEIL) * pixels + _VEIL), extent=(0, grid, grid, 0), interpolation="nearest")
    if not mask.all():
        _outline(ax, mask)
    ax.set(xlim=(0, grid), ylim=(grid, 0), xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _outline(ax: Axes, mask: np.ndarray) -> None:
    """A line wherever a kept and a dropped patch, or a kept one and the picture's rim, meet."""
    for field, vertical in ((mask, False), (mask.T, True)):
        padded = np.pad(field, ((1, 1), (0, 0)))
        across, along = np.nonzero(padded[1:] != padded[:-1])
        lines = (np.stack([across, across]), np.stack([along, along + 1]))
        ax.plot(*(lines if vertical else lines[::-1]), color=_EDGE, linewidth=0.7, clip_on=False)


@style.styled()
def draw_kept(pixels: np.ndarray, prefill, sample: int = 0, title: str | None = None, width: float = 7.0) -> Figure:
    """The picture, and beside it what is left of it after each pruning point.

    Recycled tokens are mixtures of several patches and have no place in the picture; their number is in the title.

    Args:
        pixels: [H, W, 3] float in 0 ... 1, see :func:`seen_pixels`.
        prefill: a record of the trace, `trace.prefills[i]`, of a prompt with one picture.
        sample: row of the batch.
        title: above the whole figure, for instance the question.
        width: of the figure in inches.

    Raises:
        ValueError: the visual tokens do not form one square picture (several pictures, a video).
    """
    grid = math.isqrt(prefill.n_visual[sample])
    if grid * grid != prefill.n_visual[sample]:
        raise ValueError(f"{prefill.n_visual[sample]} visual tokens are not the patches of one square picture")
    panels = 1 + len(prefill.stages)
    fig, axes = style.figure(width / panels + (0.6 if title else 0.35), width, columns=panels)
    axes = np.atleast_1d(axes)
    draw_patches(axes[0], pixels, range(grid * grid), grid)
    axes[0].set_title(f"the picture:\n{grid * grid} patches")
    for ax, stage in zip(axes[1:], prefill.stages, strict=True):
        origin = stage.origin[sample]
        draw_patches(ax, pixels, origin[origin >= 0].tolist(), grid)
        where = "at the input" if stage.layer < 0 else f"after layer {stage.layer}"
        merged = int((origin < 0).sum()) + stage.recycled[sample]
        recycled = f" + {merged} recycled" if merged else ""
        ax.set_title(f"{where}:\n{stage.tokens_out[sample] - merged} patches{recycled}")
    if title:
        fig.suptitle(title, fontsize=9)
    return fig


def main(argv: list[str] | None = None) -> None:
    """Ask a question about a picture and draw what survives; one line on stderr for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="mini", help="any name for sparsevlm.load")
    parser.add_argument("--method", default="sparsevlm", help=", ".join(sparsevlm.methods()))
    parser.add_argument("--budget", type=yaml.safe_load, default=64, help="mean visual tokens per layer")
    parser.add_argument("--output", type=Path, default=Path("kept.png"), help="PNG or PDF to write")
    args = parser.parse_args(argv)
    try:
        method = sparsevlm.build(args.method, budget=args.budget)
        model, processor = sparsevlm.load(args.model)
        inputs = processor(text=args.question, images=Image.open(args.picture).convert("RGB"))
        with torch.no_grad(), method(model) as trace:
            model(**inputs, logits_to_keep=1)
        if not trace.prefills:
            raise ValueError("nothing was pruned")
        pixels = seen_pixels(inputs["pixel_values"][0], processor.image_processor)
        draw_kept(pixels, trace.prefills[0], title=args.question).savefig(args.output, dpi=200)
    except (ValueError, OSError) as error:
        print(f"draw_kept: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(args.output)


if __name__ == "__main__":
    main()
