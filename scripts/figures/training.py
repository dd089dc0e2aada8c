"""How the embedded models learnt: accuracy per type of question on test pictures, over the minutes of training.

Reads `<results>/training/<model>.json` (learning curves as `sparsevlm.mini.training` writes them, one after the other
where a model was trained in several runs; nothing is drawn where there are none) and writes `training__<model>.png`
and `.pdf` to `<results>/figures/`.
"""

from __future__ import annotations

import json
from itertools import pairwise, zip_longest
from pathlib import Path

from scripts.figures import style

_NO_SCORES = ("phase", "step", "images", "loss", "minutes", "run", "mean")


def plot(results: Path) -> list[Path]:
    """Draw a figure per learning curve in `<results>/training/`; returns the files' paths.

    Raises:
        ValueError: a file is no learning curve.
    """
    paths: list[Path] = []
    for path in sorted((results / "training").glob("*.json")):
        try:
            figure = draw(path.stem, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no learning curve ({type(error).__name__}: {error})") from error
        paths += style.save(figure, results / "figures", f"training__{path.stem}")
    return paths


@style.styled()
def draw(model: str, points: list[dict]):
    """Figure of one model, a panel per type; a dashed line where one phase or run ends and the next begins.

    Args:
        model: its name.
        points: of the learning curve, in order: `minutes` and the accuracy (0 to 1) of each type and their `mean`.
            Those of stage 1, which have no `mean`, are left out.

    Raises:
        ValueError: no points.
    """
    points = [point for point in points if "mean" in point]
    if not points:
        raise ValueError("it holds no points of stage 2")
    panels = ["mean", *(key for key in points[-1] if key not in _NO_SCORES)]
    columns = 5 if len(panels) > 8 else 4
    rows = -(-len(panels) // columns)
    fig, axes = style.figure(0.3 + 1.25 * rows, style.PAGE_INCHES, rows, columns)
    minutes = [point["minutes"] for point in points]
    for axis, name in zip_longest(axes.flat, panels):
        if name is None:
            axis.set_axis_off()
            continue
        for before, after in pairwise(points):
            if (before.get("run"), before["phase"]) != (after.get("run"), after["phase"]):
                axis.axvline(before["minutes"], color="#888888", lw=0.6, ls="--")
        axis.plot(minutes, [100 * point[name] for point in points], ".-", color="black", lw=1, markersize=2.5)
        axis.set_title(name)
        axis.set_ylim(0, 102)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    fig.suptitle(f"{model}: accuracy on test pictures as training went on", fontsize=8)
    return fig
