"""Which visual tokens survive each pruning layer, drawn over the picture as the model sees it, and which words rate.

    python scripts/draw_kept.py picture.png "what digit is red ?" --budget 64 --output kept.png
    python scripts/draw_kept.py video.mp4 "What is the man doing?" --model video-llava-7b --budget 194

As the papers' Figures 3, 6 and 11: above the pictures the words after the picture, the darker the more relevant to it
(r of eq. 5), the raters underlined. Of a video every row is a pruning layer and every column a frame.
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
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from scripts.figures import style
from scripts.figures.words import Word, draw_words, words_height
from sparsevlm.core.raters import relevance
from sparsevlm.settings import parse_options, parse_value

_VEIL = 0.75  # how far a dropped patch fades towards white
_EDGE = to_rgb("#D55E00")
_STILLS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}


def seen_pixels(pixel_values: torch.Tensor, image_processor) -> np.ndarray:
    """The picture as the model sees it: resized, cropped or padded, with the normalisation undone.

    Args:
        pixel_values: [..., 3, H, W] float, one picture, or the frames of a video, as the processor made them.
        image_processor: has `image_mean` and `image_std` (3 floats each).

    Returns:
        [..., H, W, 3] float in 0 ... 1.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return (pixel_values.cpu().float() * std + mean).clamp(0, 1).movedim(-3, -1).numpy()


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
def draw_kept(
    pixels: np.ndarray, prefill, sample: int = 0, title: str | None = None, width: float = style.PAGE_INCHES,
    words: Sequence[Word] = (),
) -> Figure:  # fmt: skip
    """The picture, and beside it what is left of it after each pruning point.

    Recycled tokens are mixtures of several patches and have no place in the picture; their number is in the title.

    Args:
        pixels: [H, W, 3] float in 0 ... 1, see :func:`seen_pixels`; of a video [frames, H, W, 3].
        prefill: a record of the trace, `trace.prefills[i]`, of a prompt with one picture or one video.
        sample: row of the batch.
        title: above the whole figure, for instance the question.
        width: of the figure in inches.
        words: above the pictures, see :func:`rated_words`.

    Raises:
        ValueError: the visual tokens do not form square pictures (several pictures, another number of frames).
    """
    n, video = prefill.n_visual[sample], pixels.ndim == 4
    frames = pixels if video else pixels[None]
    grid = math.isqrt(n // len(frames))
    extra = n // len(frames) - grid * grid  # Video-LLaVA keeps the CLS token of every frame, before its patches
    if n % len(frames) or extra not in ((0, 1) if video else (0,)):
        what = f"the patches of {len(frames)} square frames" if video else "the patches of one square picture"
        raise ValueError(f"{n} visual tokens are not {what}")
    steps = [("the video" if video else "the picture", range(n), 0)]
    steps += [_step(stage, sample) for stage in prefill.stages]
    columns, rows = (len(frames), len(steps)) if video else (len(steps), 1)
    top = words_height(words, width) + (0.3 if title else 0.05)
    below = rows * (width / columns + 0.02) + (0.05 if video else 0.32)
    fig = Figure(figsize=(width, top + below), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=[top, below])
    axes = lower.subplots(rows, columns, squeeze=False)
    for i, (where, kept, merged) in enumerate(steps):
        of_frame = [_patches(kept, f, grid, extra) for f in range(len(frames))]
        count = sum(map(len, of_frame))
        recycled = f" + {merged} recycled" if merged else ""
        for f, patches in enumerate(of_frame):
            draw_patches(axes[i, f] if video else axes[0, i], frames[f], patches, grid)
        if video:
            axes[i, 0].set_ylabel(f"{where}\n{count} patches" + recycled.replace(" +", "\n+"), fontsize=6)
        else:
            axes[0, i].set_title(f"{where}:\n{count} patches{recycled}")
    if title:
        upper.suptitle(title, fontsize=9)
    if words:
        draw_words(upper, words, top - (0.3 if title else 0.05), top)
    return fig


def _step(stage, sample: int) -> tuple[str, list[int], int]:
    """Where a stage acts, the original visual tokens that are left, and how many merged ones."""
    origin = stage.origin[sample]
    where = "at the input" if stage.layer < 0 else f"after layer {stage.layer}"
    return where, origin[origin >= 0].tolist(), int((origin < 0).sum()) + stage.recycled[sample]


def _patches(kept: Sequence[int], frame: int, grid: int, extra: int) -> list[int]:
    """Of kept tokens those that are patches of a frame, as indices into it."""
    size = grid * grid + extra
    return [token % size - extra for token in kept if token // size == frame and token % size >= extra]


def rated_words(model, processor, inputs, method) -> tuple[list[Word], object]:
    """Run the prompt once; the text after the picture with its relevance, and the trace's record of the prefill.

    Args:
        inputs: of one question with one picture or video, as the processor made them.

    Raises:
        ValueError: nothing was pruned.
    """
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True, prepend=True
    )
    try:
        with torch.no_grad(), method(model) as trace:
            model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    if not trace.prefills:
        raise ValueError("nothing was pruned")
    ids, embeddings = inputs["input_ids"], seen["inputs_embeds"]
    media = {processor.image_token_id, processor.video_token_id} - {None}
    visual = torch.isin(ids, torch.tensor(sorted(media), device=ids.device))
    after = int(visual[0].nonzero()[-1]) + 1
    weights = relevance(embeddings[:, visual[0]], embeddings[:, after:], centred=_centred(method))[0]
    raters = set(trace.prefills[0].raters[0].tolist())
    tokens = processor.tokenizer.convert_ids_to_tokens(ids[0, after:].tolist())
    pairs = enumerate(zip(tokens, weights.tolist(), strict=True), after)
    return [Word(token, weight, i in raters) for i, (token, weight) in pairs], trace.prefills[0]


def _centred(method) -> bool:
    return getattr(method, "raters", None) == "centred"


def main(argv: list[str] | None = None) -> None:
    """Ask a question about a picture or a video and draw what survives; one line on stderr for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path, help="a picture, or a video for a model that takes videos")
    parser.add_argument("question")
    parser.add_argument("--model", default="mini", help="any name for sparsevlm.load")
    parser.add_argument("--method", default="sparsevlm", help=", ".join(sparsevlm.methods()))
    parser.add_argument("--budget", type=parse_value, default=64, help="mean visual tokens per layer")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method; repeatable")
    parser.add_argument("--output", type=Path, default=Path("kept.png"), help="PNG or PDF to write")
    args = parser.parse_args(argv)
    try:
        options = parse_options(args.option)
        method = sparsevlm.build(args.method, budget=args.budget, **options)
        model, processor = sparsevlm.load(args.model)
        still = args.picture.suffix.lower() in _STILLS
        media = {"images": Image.open(args.picture).convert("RGB")} if still else {"videos": str(args.picture)}
        inputs = processor(text=args.question, **media).to(model.device)
        words, prefill = rated_words(model, processor, inputs, method)
        made = inputs["pixel_values" if still else "pixel_values_videos"][0]
        fig = draw_kept(seen_pixels(made, processor.image_processor), prefill, title=args.question, words=words)
        fig.savefig(args.output, dpi=200)
    except (ValueError, OSError) as error:
        print(f"draw_kept: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(args.output)


if __name__ == "__main__":
    main()
