"""Figures as files, and what they have in common."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import MissingExtraError
from .whole_output import write_whole

# Colours that can be told apart with any kind of colour vision (Okabe & Ito, "Color Universal Design", 2008).
BASE_COLOURS = {"A": "#009E73", "C": "#0072B2", "G": "#E69F00", "T": "#D55E00"}
STRAND_COLOURS = {"+": "#0072B2", "-": "#D55E00"}
GENE_COLOUR = "#333333"
OTHER_COLOUR = "#999999"

_LOGO_WIDTH = 0.9  # of a letter, where the next one stands at 1


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into files without a display.

    Raises:
        MissingExtraError: if Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("figures need Matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_figure(path: str | Path, figure: Any) -> None:
    """Write a Matplotlib figure whole, in the format of the file's suffix, and close it.

    The same figure is the same file: SVG gets no date, and ids that depend on its name only.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    path = Path(path)
    content = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    write_whole(path, content.getvalue())


def draw_letters(axis: Any, rows: Sequence[str], first: int) -> None:
    """Write sequences as rows of coloured letters, the first row on top.

    Args:
        axis: of Matplotlib.
        rows: sequences of one length.
        first: where the first letter stands on the axis; the others follow at 1, 2, ...
    """
    for row, letters in enumerate(rows):
        for place, letter in enumerate(letters):
            axis.text(
                first + place,
                -row,
                letter,
                color=BASE_COLOURS.get(letter.upper(), OTHER_COLOUR),
                family="monospace",
                weight="bold",
                size=min(10, 900 / len(letters)),
                ha="center",
                va="center",
            )
    axis.set_ylim(0.5 - len(rows), 0.5)


def draw_stacked_letters(axis: Any, columns: Sequence[Sequence[tuple[str, float]]], first: int) -> None:
    """Draw a logo: letters on top of each other, as high as they count; those below 0 hang from the line.

    Args:
        axis: of Matplotlib.
        columns: letters and heights, from the line outwards.
        first: where the first column stands on the axis; the others follow at 1, 2, ...
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    font = FontProperties(family="DejaVu Sans", weight="bold")
    glyphs = {letter: TextPath((0, 0), letter, prop=font) for column in columns for letter, _ in column}
    low = high = 0.0
    for place, column in enumerate(columns, first):
        above = below = 0.0
        for letter, height in column:
            bottom = above if height >= 0 else below + height
            above, below = (above + height, below) if height >= 0 else (above, below + height)
            box = glyphs[letter].get_extents()
            to_place = Affine2D().translate(-box.x0, -box.y0).scale(_LOGO_WIDTH / box.width, abs(height) / box.height)
            to_place = to_place.translate(place - _LOGO_WIDTH / 2, bottom)
            colour = BASE_COLOURS.get(letter.upper(), OTHER_COLOUR)
            axis.add_patch(PathPatch(glyphs[letter].transformed(to_place), color=colour, linewidth=0))
        low, high = min(low, below), max(high, above)
    axis.set_ylim(limits_of_letters(low, high))


def limits_of_letters(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis with letters from `low`, 0 or less, to `high`, 0 or more."""
    room = 0.05 * max(high, -low)
    return low - (room if low < 0 else 0), high + (room or 1.0)
