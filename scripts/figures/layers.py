"""Rank of the raters' attention and kept visual tokens per layer, from the runs of `python -m eval.measure.layers`.

Writes `layers__<model>__n<questions>.png` and `.pdf` to `<results>/figures/`, and nothing where nobody measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from eval.runs.reader import LAYERS, Run
from scripts.figures import style


def plot_runs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """The figures of all such runs, of several of one model and length the newest."""
    newest = {}
    for run in sorted((r for r in runs if r.task == LAYERS), key=lambda r: r.metrics["date"]):
        newest[f"layers__{run.model}__n{run.metrics['n']}"] = run
    return [path for name, run in newest.items() for path in style.save(layers(run), folder, name)]


@style.styled()
def layers(run: Run) -> Figure:
    """Above: rank per layer, mean and range over questions, beside the number of raters; below: tokens left."""
    frame = pd.DataFrame(run.metrics["rows"])
    fig, (above, below) = style.figure(4.6, style.COLUMN_INCHES, 2, 1)
    ranks = frame[frame["what"] == "rank"]
    for setting, look in style.looks(list(ranks["setting"].unique())).items():
        rows = ranks[ranks["setting"] == setting]
        above.fill_between(rows["layer"], rows["smallest"], rows["largest"], color=look["color"], alpha=0.15, lw=0)
        above.plot(rows["layer"], rows["mean"], **{**look, "label": f"rank, raters={setting}"})
        raters = frame[(frame["what"] == "raters") & (frame["setting"] == setting)]["mean"].mean()
        above.axhline(raters, color=look["color"], lw=0.8, ls=(0, (1, 2)))
        above.annotate(
            f"{raters:.1f} raters", (1, raters), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            fontsize=6, color=look["color"],
        )  # fmt: skip
    above.set_ylim(bottom=0, top=above.get_ylim()[1] * 1.12)
    above.set_ylabel("rank of P")
    above.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    tokens = frame[frame["what"] == "tokens"]
    settings = list(tokens["setting"].unique())
    looks = style.looks(settings)
    for setting in settings:
        rows = tokens[tokens["setting"] == setting]
        look = {**looks[setting], "marker": "", "drawstyle": "steps-post"}
        below.fill_between(rows["layer"], rows["smallest"], rows["largest"], step="post", color=look["color"],
                           alpha=0.15, lw=0)  # fmt: skip
        below.plot(rows["layer"], rows["mean"], **look)
    below.set_ylim(bottom=0)
    below.set_ylabel("visual tokens left")
    for ax in (above, below):
        ax.set_xlabel("layer")
        ax.set_xlim(-0.5, frame["layer"].max() + 0.9)
        ax.set_xticks(sorted(frame["layer"].unique())[:: 1 if frame["layer"].max() < 14 else 4])
    below.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, handlelength=3)
    fig.suptitle(f"model {run.model}, {run.metrics['n']} questions; bands: smallest to largest", fontsize=8)
    return fig
