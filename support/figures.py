"""Figures as files."""

import io
from pathlib import Path
from typing import Any

from .errors import MissingExtraError
from .whole_output import write_whole


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into files without a display.

    Raises:
        MissingExtraError: if Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("figures need matplotlib: pip install 'gengram[evaluation]'") from None
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
