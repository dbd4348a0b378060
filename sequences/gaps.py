"""Bases of a sequence that are not known: N, `?` and `[MASK]`."""

import re
from typing import NamedTuple

from ..support.errors import InputError, shortened
from .alphabet import BASES, IUPAC

_UNKNOWN = r"\[MASK\]|[Nn?]"
_RUN = re.compile(f"(?:{_UNKNOWN})+")
_ONE = re.compile(_UNKNOWN)
_CODE = re.compile(f"[{''.join(code for code, bases in IUPAC.items() if 1 < len(bases) < len(BASES))}]", re.IGNORECASE)
_FOREIGN = re.compile(f"[^{''.join(IUPAC)}]", re.IGNORECASE)


class Gap(NamedTuple):
    """A base that is not known.

    Args:
        place: of the base in the sequence, from 0.
        bases: what it may be, such as `ACGT`.
    """

    place: int
    bases: str = BASES


class GappedSequence(NamedTuple):
    """A sequence with gaps.

    Args:
        letters: one for each base, case kept; N where `?` or `[MASK]` stood.
        gaps: in the order of their places.
        long_runs: how many runs of unknown bases are too long to be gaps.
        long_run_bases: how many bases these have.
    """

    letters: str
    gaps: list[Gap]
    long_runs: int = 0
    long_run_bases: int = 0


def find_gaps(text: str, longest_run: int = 16, with_codes: bool = False) -> GappedSequence:
    """The gaps of a sequence.

    Args:
        text: IUPAC codes of DNA, `?`, and `[MASK]`, which stands for one base.
        longest_run: a run of more unknown bases is no gap but a piece of sequence that is missing, and stays as it is.
        with_codes: whether codes of two or three bases, such as R for A or G, are gaps too.

    Raises:
        InputError: if there is another letter.

    Example:

    >>> find_gaps("ACN[MASK]gR", with_codes=True)
    GappedSequence(letters='ACNNgR', gaps=[Gap(place=2, bases='ACGT'), Gap(place=3, bases='ACGT'), \
Gap(place=5, bases='AG')], long_runs=0, long_run_bases=0)
    """
    pieces, gaps, runs, missing = [], [], 0, 0
    length = done = 0  # bases so far; characters so far
    for run in _RUN.finditer(text):
        unknown = _ONE.findall(run[0])
        pieces += [text[done : run.start()], "".join(each if each in "Nn" else "N" for each in unknown)]
        length, done = length + run.start() - done, run.end()
        if len(unknown) <= longest_run:
            gaps += [Gap(length + place) for place in range(len(unknown))]
        else:
            runs, missing = runs + 1, missing + len(unknown)
        length += len(unknown)
    letters = "".join([*pieces, text[done:]])
    if foreign := _FOREIGN.search(letters):
        raise InputError(
            f"expected letters of DNA, N, ? and [MASK], got {shortened(foreign[0])} at base "
            f"{foreign.start():,} (from 0)"
        )
    if with_codes:
        gaps += [Gap(code.start(), IUPAC[code[0].upper()]) for code in _CODE.finditer(letters)]
        gaps.sort()
    return GappedSequence(letters, gaps, runs, missing)
