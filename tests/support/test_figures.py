import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from gengram.support.figures import write_figure


def drawn() -> Figure:
    figure = Figure()
    axis = figure.add_subplot()
    axis.plot([0, 1, 2], [1, 3, 2], label="line")
    axis.set_xlim(0, 1)  # what is cut off needs a clip path, whose id is random by default
    axis.legend()
    return figure


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_same_figure_is_the_same_file(suffix, start, tmp_path):
    paths = [tmp_path / folder / f"figure.{suffix}" for folder in ("a", "b")]
    for path in paths:
        write_figure(path, drawn())
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1] and contents[0].startswith(start) and b"<dc:date>" not in contents[0]
