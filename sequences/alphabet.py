"""The letters of DNA: bases and their digits, the IUPAC codes, and the other strand."""

import numpy as np

from ..support.errors import InputError, shortened

BASES = "ACGT"  # a base's digit is its place here, and the digits of a base and its complement make 3
OTHER = 4  # the digit of everything else
IUPAC = {
    "A": "A",
    "C": "C",
    "G": "G",
    "T": "T",
    "U": "T",
    "R": "AG",
    "Y": "CT",
    "S": "CG",
    "W": "AT",
    "K": "GT",
    "M": "AC",
    "B": "CGT",
    "D": "AGT",
    "H": "ACT",
    "V": "ACG",
    "N": "ACGT",
}  # code -> the bases that it may be


def _complements() -> dict[str, str]:
    codes = {bases: code for code, bases in IUPAC.items() if code != "U"}
    return {code: codes["".join(BASES[3 - BASES.index(base)] for base in reversed(IUPAC[code]))] for code in IUPAC}


_COMPLEMENT = str.maketrans(
    {letter: other for a, b in _complements().items() for letter, other in ((a, b), (a.lower(), b.lower()))}
)


def reverse_complement(sequence: str) -> str:
    """The other strand, read in its own direction; case and IUPAC codes are kept, U becomes A."""
    return sequence.translate(_COMPLEMENT)[::-1]


def digit_table(codes: list[int]) -> np.ndarray:
    """Digits by a code below 256, (256,) uint8: 0 to 3 for the codes given of A, C, G and T, `OTHER` for the rest."""
    table = np.full(256, OTHER, dtype=np.uint8)
    table[codes] = range(len(BASES))
    return table


_DIGITS = digit_table([ord(base) for base in BASES])
for _code, _bases in IUPAC.items():
    if len(_bases) == 1:
        _DIGITS[[ord(_code), ord(_code.lower())]] = BASES.index(_bases)


def base_digits(sequence: str) -> np.ndarray:
    """0 to 3 for A, C, G and T (or U) in either case, `OTHER` for everything else; (length,) uint8."""
    return _DIGITS[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]


_CODES = "".join(IUPAC).encode() + "".join(IUPAC).lower().encode()
_CERTAIN = b"ACGTUacgtu"


def strange_letter(sequence: str) -> int | None:
    """The place of the first character that is no IUPAC code of DNA or RNA in either case; None if there is none."""
    strange = sequence.encode("ascii", "replace").translate(None, _CODES)
    return sequence.encode("ascii", "replace").index(strange[:1]) if strange else None


def check_letters(sequence: str, where: str, first: int = 0) -> None:
    """Refuse letters that no model of DNA knows, and which it would read as N without a word.

    Args:
        sequence: or a part of it.
        where: what errors begin with.
        first: place of the part's first base, from 0.

    Raises:
        InputError: if there is a character that is no IUPAC code of DNA or RNA.
    """
    place = strange_letter(sequence)
    if place is not None:
        hint = "; remove the gaps of an alignment first" if sequence[place] in "-." else ""
        raise InputError(
            f"{where}: expected DNA (A, C, G, T, N or other IUPAC codes), got {shortened(sequence[place])} at base "
            f"{first + place + 1:,}{hint}."
        )


def uncertain_letters(sequence: str) -> int:
    """How many letters are not A, C, G, T or U."""
    return len(sequence.encode("ascii", "replace").translate(None, _CERTAIN))
