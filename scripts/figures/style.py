"""How every figure looks: column width (3.4 in), colours safe for the colour-blind, markers that survive grey print."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

COLUMN_INCHES = 3.4
PAGE_INCHES = 7.0
RC = {
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # editable text in the PDF
    "svg.hashsalt": "sparsevlm",
}
UNPRUNED = {"color": "#333333", "label": "unpruned"}

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which vanishes on white.
_COLOURS = ["#0072B2", "#D55E00", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#000000"]
_MARKERS = ["o", "X", "s", "^", "D", "v", "P"]
_LINES = ["-", ":", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
# A method keeps its look in every figure, unless another one of the figure has taken it.
_LOOKS = {
    "sparsevlm": 0, "random": 1, "sparsevlm (raters=all)": 2, "sparsevlm_plus": 3, "sparsevlm_rank": 4, "fastv": 3,
    "pyramiddrop": 4, "dart": 0, "ficoco_l": 5, "random_layer": 2, "visionzip": 5, "aim": 0, "divprune": 2,
    "fastervlm": 3, "vispruner": 4, "cdpruner": 6, "tome": 6, "folder": 0, "folder_simple": 1, "ficoco_v": 2,
    "downsample": 3,
}  # fmt: skip
#: What an overview of all methods shows in colour.
HIGHLIGHTED = (
    "signpost", "divprune", "mmtok", "sparsevlm (raters=all)", "sparsevlm", "random_layer (match=sparsevlm)",
)  # fmt: skip
MOST_LINES = len(_COLOURS)  # in one panel


def looks(labels: list[str]) -> dict[str, dict]:
    """Keyword arguments of `Axes.errorbar` per line, the same for a label in every figure that knows it.

    Known labels come first; those beyond them, and those whose look is taken, get the looks that are left, in the order
    given, and then start over.
    """
    index: dict[str, int] = {}
    for label in labels:
        if label in _LOOKS and _LOOKS[label] not in index.values():
            index[label] = _LOOKS[label]
    free = [i for i in range(MOST_LINES) if i not in index.values()] or list(range(MOST_LINES))
    for i, label in enumerate(label for label in labels if label not in index):
        index[label] = free[i % len(free)]
    return {
        label: {"color": _COLOURS[i], "marker": _MARKERS[i], "linestyle": _LINES[i], "label": label}
        for label, i in index.items()
    }


def legend_columns(labels: list[str]) -> dict:
    """Keyword arguments of a legend at column width: one column if a label is long."""
    return {"ncols": 1 if max(map(len, labels), default=0) > 24 else 2, "handlelength": 3.5, "columnspacing": 1.5}


def legend_inches(labels: list[str]) -> float:
    """Height of a legend with these labels and the unpruned model's."""
    columns = legend_columns(labels)["ncols"]
    return 0.25 + 0.15 * -(-(len(labels) + 1) // columns)


def styled():
    """The common style, as a decorator of functions that draw or as a context: `@styled()`, `with styled():`."""
    return rc_context(RC)


def figure(height: float = 2.3, width: float = COLUMN_INCHES, rows: int = 1, columns: int = 1):
    """A figure and its axes; sizes in inches. Made without pyplot, so no display is needed."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns)


@styled()
def save(fig: Figure, folder: Path, name: str) -> list[Path]:
    """Write `<name>.png` and `<name>.pdf` and return both paths.

    The files carry no date, so that equal results give equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    fig.savefig(paths[0], metadata={"Software": None})
    fig.savefig(paths[1], metadata={"CreationDate": None})
    return paths
