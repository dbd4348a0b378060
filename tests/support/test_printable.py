import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.support.printable import is_file_name, printable, printable_lines


@given(st.text())
def test_what_is_shown_is_printable_and_ordinary_names_stay_as_they_are(name):
    shown = printable(name)
    assert shown.isprintable() and len(printable(name * 100)) <= 203 * 10
    assert shown == name or not name.isprintable() or len(name) > 200


@pytest.mark.parametrize(
    "name, shown",
    [
        ("chr1", "chr1"),
        ("é ж", "é ж"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nerror: all is well", r"a\nerror: all is well"),
        ("\x9b2J", r"\x9b2J"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("\udc80", r"\udc80"),
    ],
)
def test_escapes_are_shown_and_not_obeyed(name, shown):
    assert printable(name) == shown
    assert printable_lines(f"{name}\nb") == f"{shown}\nb" or "\n" in name


@pytest.mark.parametrize("name", ["train", "chr1.v2", "a-b", "_", "x" * 100])
def test_plain_names_can_be_files(name):
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "a\\b", "a..b", ".a", "a.", "a b", "-x", "é", "a\n", "x" * 101, "a\0b", "C:x"],
)
def test_what_could_be_a_path_or_an_option_cannot(name):
    assert not is_file_name(name)
