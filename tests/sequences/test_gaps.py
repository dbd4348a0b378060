import doctest

import pytest

from gengram.sequences import gaps as module
from gengram.sequences.gaps import Gap, find_gaps
from gengram.support.errors import InputError


def places(text: str, **options) -> list[int]:
    return [gap.place for gap in find_gaps(text, **options).gaps]


@pytest.mark.parametrize(
    "text, letters, expected",
    [
        ("", "", []),
        ("ACGTacgtu", "ACGTacgtu", []),
        ("ACNTn", "ACNTn", [2, 4]),
        ("?AC?", "NACN", [0, 3]),
        ("A[MASK][MASK]C?N", "ANNCNN", [1, 2, 4, 5]),
        ("[MASK]", "N", [0]),
        ("ARYn", "ARYn", [3]),
    ],
)
def test_every_unknown_base_is_a_gap_of_one_letter(text, letters, expected):
    found = find_gaps(text)
    assert found.letters == letters and [gap.place for gap in found.gaps] == expected
    assert {gap.bases for gap in found.gaps} <= {"ACGT"} and found.long_runs == 0


def test_runs_that_are_too_long_stay():
    found = find_gaps("AN[MASK]?C" + "N" * 4 + "GnT", longest_run=3)
    assert found.letters == "ANNNCNNNNGnT" and places("AN[MASK]?C" + "N" * 4 + "GnT", longest_run=3) == [1, 2, 3, 10]
    assert (found.long_runs, found.long_run_bases) == (1, 4)
    assert places("NNN", longest_run=0) == [] and places("NNN", longest_run=3) == [0, 1, 2]


def test_codes_are_gaps_of_fewer_bases_on_request():
    found = find_gaps("AvCNyU", with_codes=True)
    assert found.gaps == [Gap(1, "ACG"), Gap(3), Gap(4, "CT")] and found.letters == "AvCNyU"


@pytest.mark.parametrize("text, letter, place", [("AC-GT", "'-'", 2), ("[MASK]EF", "'E'", 1), ("AC[MASK", r"'\['", 2)])
def test_other_letters_are_refused(text, letter, place):
    with pytest.raises(
        InputError, match=rf"expected letters of DNA, N, \? and \[MASK\], got {letter} at base {place}"
    ):
        find_gaps(text)


def test_examples_in_docstrings():
    assert doctest.testmod(module).failed == 0
