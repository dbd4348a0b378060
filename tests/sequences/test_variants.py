import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.genome import genome_of
from gengram.sequences.variants import REASONS, ReferenceCheck, Variant, allele_status, variant_windows
from gengram.support.errors import InputError

# ---- alleles


@pytest.mark.parametrize(
    "reference, alternative, status",
    [
        ("A", "C", ""),
        ("a", "gN", ""),
        ("ACGT", "A", ""),
        ("A", "*", "spanning_deletion"),
        ("A", ".", "missing_allele"),
        ("A", "", "missing_allele"),
        ("A", "  ", "missing_allele"),
        ("A", "NAN", "missing_allele"),
        ("A", "nan", "missing_allele"),
        (".", "A", "missing_allele"),
        ("", "A", "missing_allele"),
        ("A", "-", "gap_allele"),
        ("-", "A", "gap_allele"),
        ("A", "A,T", "several_alleles"),
        ("A", "C/T", "several_alleles"),
        ("A", "<DEL>", "symbolic_allele"),
        ("A", "<NON_REF>", "symbolic_allele"),
        ("A", "<*>", "symbolic_allele"),
        ("A", "<DUP:TANDEM>", "symbolic_allele"),
        ("G", "G]17:198982]", "breakend"),
        ("G", "]13:123456]T", "breakend"),
        ("G", "[17:198983[A", "breakend"),
        ("G", ".A", "breakend"),
        ("G", "G.", "breakend"),
        ("A", "R", "not_acgtn"),
        ("A", "U", "not_acgtn"),
        ("A", "A C", "not_acgtn"),
        ("A", "Ä", "not_acgtn"),
        ("R", "A", "not_acgtn"),
        ("N", "A", "n_at_site"),
        ("ANG", "A", "n_at_site"),
        ("A", "a", "ref_equals_alt"),
    ],
)
def test_only_dna_is_scored(reference, alternative, status):
    assert allele_status(reference, alternative) == status
    assert not status or status in REASONS


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=8), st.text(max_size=8))
def test_no_text_but_dna_is_ever_scored(reference, alternative):
    if allele_status(reference, alternative) == "":
        assert reference and alternative and set(reference) <= set("ACGTacgt")
        assert set(alternative) <= set("ACGTNacgtn") and reference.upper() != alternative.upper()


GENOME = {"chr1": "ACGTNACGTRAC-GTAC" + "ACGGT" * 40, "2": "acgt"}


@pytest.mark.parametrize(
    "variant, status",
    [
        (Variant("chr1", 0, "A", "C"), ""),
        (Variant("1", 1, "cg", "C"), ""),
        (Variant("chr2", 3, "T", "TA"), ""),
        (Variant("chr1", 0, "C", "A"), "ref_mismatch"),
        (Variant("chr1", 3, "TA", "T"), "n_at_site"),
        (Variant("chr1", 4, "N", "T"), "n_at_site"),
        (Variant("chr1", 9, "A", "T"), "n_at_site"),
        (Variant("chr1", 11, "CG", "T"), "foreign_letters"),
        (Variant("chr3", 0, "A", "T"), "no_such_contig"),
        (Variant("2", 4, "A", "T"), "beyond_contig"),
        (Variant("2", 3, "TA", "T"), "beyond_contig"),
        (Variant("2", -1, "A", "T"), "beyond_contig"),
        (Variant("2", 10**15, "A", "T"), "beyond_contig"),
        (Variant("2", 0, "A", "<DEL>"), "symbolic_allele"),
    ],
)
def test_a_variant_is_compared_with_the_genome(variant, status):
    assert ReferenceCheck(genome_of(GENOME)).status(variant) == status
    assert not status or status in REASONS


def test_few_mismatches_are_marked_and_many_stop_the_run():
    sequence = "ACGT" * 500
    right = [Variant("a", place, sequence[place], "N") for place in range(2000)]
    few = ReferenceCheck(genome_of({"a": sequence}))
    wrong = {17, 300, 301, 1500}
    found = [few.status(v._replace(reference="TACG"[i % 4]) if i in wrong else v) for i, v in enumerate(right)]
    few.finish()
    assert {i for i, status in enumerate(found) if status} == wrong and few.mismatches == 4 and few.compared == 2000

    shifted = ReferenceCheck(genome_of({"a": sequence}, "hg19.fa"))
    with pytest.raises(InputError, match=r"10 of 10 reference alleles .* at a:11 REF is 'C', but hg19\.fa has 'G'"):
        for variant in right:
            shifted.status(variant._replace(start=variant.start + 1) if variant.start < 1999 else variant)

    late = ReferenceCheck(genome_of({"a": sequence}))
    assert [late.status(variant) for variant in right[:30]] == [""] * 30
    with pytest.raises(InputError, match="another assembly, or are the positions counted from 0"):
        for variant in right[30:]:
            late.status(variant._replace(start=variant.start - 1))


def test_a_short_file_of_which_most_does_not_fit_is_stopped_at_its_end():
    check = ReferenceCheck(genome_of({"a": "ACGTACGT"}))
    assert [check.status(Variant("a", place, "T", "N")) for place in range(4)] == ["ref_mismatch"] * 3 + [""]
    with pytest.raises(InputError, match="3 of 4 reference alleles are not in the genome"):
        check.finish()
    one = ReferenceCheck(genome_of({"a": "ACGTACGT"}))
    assert one.status(Variant("a", 0, "T", "N")) == "ref_mismatch"
    one.finish()


def test_contigs_of_which_none_is_in_the_genome_stop_the_run():
    check = ReferenceCheck(genome_of({"a": "ACGT"}))
    with pytest.raises(InputError, match=r"no contig of 10 variants is in the genome: the genome has no contig 'x0'"):
        for number in range(20):
            check.status(Variant(f"x{number}", 0, "A", "C"))
    some = ReferenceCheck(genome_of({"a": "ACGT"}))
    assert some.status(Variant("a", 0, "A", "C")) == ""
    assert {some.status(Variant("decoy", 0, "A", "C")) for _ in range(100)} == {"no_such_contig"}
    some.finish()


# ---- windows


def windows_by_the_contract(sequence: str, start: int, reference: str, alternative: str, length: int):
    """DESIGN.md, section 9, letter by letter."""
    size = len(sequence)
    deleted = max(0, len(reference) - len(alternative))
    left = start - length // 2
    if left > size - length - deleted:
        left = size - length - deleted
    if left < 0:
        left = 0
    edited = sequence[:start] + alternative + sequence[start + len(reference) :]
    return sequence[left : left + length], edited[left : left + length]


ALLELES = st.text("ACGTN", min_size=1, max_size=9)


@settings(max_examples=400, deadline=None)
@given(st.text("ACGTN", min_size=1, max_size=60), st.data())
def test_windows_are_those_of_the_contract(sequence, data):
    start = data.draw(st.integers(0, len(sequence) - 1))
    reference = sequence[start : start + data.draw(st.integers(1, 9))]
    alternative = data.draw(ALLELES)
    length = data.draw(st.integers(1, 70))
    found = variant_windows(sequence, "a", start, reference, alternative, length)
    deleted = max(0, len(reference) - len(alternative))
    used = min(length, len(sequence) - deleted)  # a contig that is too short is taken as far as both windows reach
    assert found[:2] == windows_by_the_contract(sequence, start, reference, alternative, used)
    assert len(found.reference) == len(found.alternative) == used
    seen = min(len(reference), used - found.start)
    assert found.reference[found.start : found.start + seen] == reference[:seen]
    seen = min(len(alternative), used - found.start)
    assert found.alternative[found.start : found.start + seen] == alternative[:seen]
    assert found.reference[: found.start] == found.alternative[: found.start]
    if length <= len(sequence) - deleted and length // 2 <= start <= len(sequence) - length - deleted + length // 2:
        assert found.start == length // 2


def test_a_substitution_leaves_the_rest_of_both_windows_as_it_is():
    generator = random.Random(0)
    sequence = "".join(generator.choices("ACGT", k=300))
    for _ in range(200):
        start = generator.randrange(300)
        alternative = generator.choice([base for base in "ACGT" if base != sequence[start]])
        reference, changed, index = variant_windows(sequence, "a", start, sequence[start], alternative, 64)
        assert [i for i in range(64) if reference[i] != changed[i]] == [index]
        opposite = [i for i in range(64) if reverse_complement(reference)[i] != reverse_complement(changed)[i]]
        assert opposite == [63 - index]


def test_lower_case_is_read_as_upper_case_and_names_may_differ_in_chr():
    found = variant_windows(genome_of({"chr7": "aaccggtt"}), "7", 4, "g", "t", 4)
    assert found == ("CCGG", "CCTG", 2)


@pytest.mark.parametrize("length", [0, -1, -512])
def test_a_window_needs_a_length(length):
    with pytest.raises(ValueError, match=f"expected a window of at least 1 base, got {length}"):
        variant_windows("ACGT", "a", 1, "C", "T", length)


@pytest.mark.parametrize("position, allele", [(1, "A"), (-1, "A"), (4, "A"), (3, "TC"), (9, "A")])
def test_a_reference_allele_that_is_not_there_is_an_error(position, allele):
    with pytest.raises(ValueError, match="are the positions 1-based"):
        variant_windows("ACGT", "a", position, allele, "T", 4)


@pytest.mark.parametrize("reference, alternative", [("", "A"), ("C", ""), ("C", "*"), ("C", "<DEL>"), ("C", "A,T")])
def test_windows_are_of_dna_only(reference, alternative):
    with pytest.raises(ValueError, match="expected alleles of the letters"):
        variant_windows("ACGT", "a", 1, reference, alternative, 4)
    with pytest.raises(ValueError):
        variant_windows("ACGT", "a", 4, "", "A", 4)
