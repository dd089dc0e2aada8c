"""Words on coloured ground: the darker the more weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

_SIZE = 7.0  # points
_LINE = 0.2  # inches from one line of words to the next
_PAD = 0.035  # inches of ground on either side of a word
_GAP = 0.05  # inches between words
_MARGIN = 0.15
_GROUND = LinearSegmentedColormap.from_list("weight", ["#ffffff", "#0072B2"])
_FONT = FontProperties(size=_SIZE)


@dataclass(frozen=True)
class Word:
    """A token of the prompt.

    Attributes:
        token: as the tokenizer writes it.
        weight: how relevant it is to the picture.
        rates: whether it is a rater.
    """

    token: str
    weight: float
    rates: bool

    @property
    def text(self) -> str:
        """Readable: marks of spaces are dropped, a line break is an arrow."""
        text = self.token.replace("▁", " ").replace("Ġ", " ").strip() or "␣"
        return {"<0x0A>": "↵", "\n": "↵"}.get(text, text)


def words_height(words: Sequence[Word], width: float) -> float:
    """Inches that the words take in a figure of this width, a line about them included."""
    return (len(_lines(words, width)) * _LINE + 0.16) if words else 0.0


def draw_words(fig: SubFigure, words: Sequence[Word], height: float, total: float) -> None:
    """Draw the words into the lower `height` inches of a part of a figure that is `total` inches high."""
    ax = fig.add_axes((0, 0, 1, height / total))
    width = fig.bbox.width / fig.figure.dpi
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    most = max(word.weight for word in words)
    lines = _lines(words, width)
    for i, line in enumerate(lines):
        for x, word in line:
            share = word.weight / most if most else 0.0
            y, long = (i + 0.5) * _LINE, _length(word)
            ax.text(
                x + _PAD, y, word.text, fontproperties=_FONT, va="center", ha="left",
                color="white" if share > 0.7 else "black",
                bbox={"facecolor": _GROUND(share), "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
            if word.rates:
                ax.plot([x, x + long + 2 * _PAD], [y + 0.085] * 2, color="#D55E00", linewidth=1.4)
    note = f"weight: relevance to the picture (largest {most:.2g}); underlined: raters"
    ax.text(_MARGIN, len(lines) * _LINE + 0.06, note, fontsize=6, va="center", color="#555555")


def _length(word: Word) -> float:
    """Inches."""
    return TextPath((0, 0), word.text, prop=_FONT).get_extents().width / 72


def _lines(words: Sequence[Word], width: float) -> list[list[tuple[float, Word]]]:
    """Words with their places, in lines that fit the width (inches)."""
    lines: list[list[tuple[float, Word]]] = [[]]
    x = _MARGIN
    for word in words:
        long = _length(word) + 2 * _PAD
        if x + long > width - _MARGIN and lines[-1]:
            lines.append([])
            x = _MARGIN
        lines[-1].append((x, word))
        x += long + _GAP
    return lines
