from hypothesis import given
from hypothesis import strategies as st

from gengram.sequences.alphabet import BASES, IUPAC, OTHER, base_digits, digit_table, reverse_complement


def test_reverse_complement_keeps_case_and_ambiguity_codes():
    assert reverse_complement("ACGTNacgtn") == "nacgtNACGT"
    assert reverse_complement("RYSWKMBDHV") == "BDHVKMWSRY"
    assert reverse_complement("ACGU") == "ACGT"


@given(st.text("ACGTN", max_size=60))
def test_reverse_complement_twice_is_the_sequence(sequence):
    assert reverse_complement(reverse_complement(sequence)) == sequence


def test_the_complement_of_a_code_is_what_its_bases_pair_with():
    pairs = dict(zip("ACGT", "TGCA", strict=True))
    for code, bases in IUPAC.items():
        assert set(IUPAC[reverse_complement(code)]) == {pairs[base] for base in bases}


@given(st.text("ACGTUNRYacgtun-é ", max_size=40))
def test_digits_are_places_in_the_alphabet(sequence):
    upper = sequence.upper().replace("U", "T")
    expected = [BASES.index(letter) if letter in BASES else OTHER for letter in upper]
    assert base_digits(sequence).tolist() == expected


def test_digits_of_a_base_and_its_complement_make_three():
    digits = base_digits(BASES)
    assert (digits + base_digits(reverse_complement(BASES))[::-1]).tolist() == [3] * 4


def test_digits_of_other_codes():
    table = digit_table([8, 5, 6, 7])
    assert table[[8, 5, 6, 7, 9, 0, 255]].tolist() == [0, 1, 2, 3, OTHER, OTHER, OTHER]
