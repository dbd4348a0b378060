import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from gengram.support.figures import draw_stacked_letters, limits_of_letters, write_figure


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


def test_letters_fill_their_axis_on_whichever_side_they_stand():
    assert limits_of_letters(0, 2) == (0, 2.1) and limits_of_letters(0, 0) == (0, 1)
    assert limits_of_letters(-1, 2) == (-1.1, 2.1)
    axis = Figure().add_subplot()
    draw_stacked_letters(axis, [[("A", -0.04)], [("C", -0.08)]], 1)
    low, high = axis.get_ylim()
    assert low < -0.08 and 0 < high < 0.01
