"""Variants: which can be scored, and the windows of both alleles."""

import re
from typing import NamedTuple

from ..support.errors import InputError, shortened
from .alphabet import BASES, IUPAC
from .genome import Genome, genome_of

SCORED = "scored"
# Why a variant is not scored: words that stay the same from release to release, and what they mean.
REASONS = {
    "no_alt": "the record has no alternative allele",
    "missing_allele": "an allele is missing (a dot, an empty cell, NaN)",
    "spanning_deletion": "the alternative allele is *, a deletion that another record describes",
    "gap_allele": "an allele is written with -; VCF writes the base in front of it with both alleles",
    "several_alleles": "several alternative alleles in one cell; give each a row of its own",
    "symbolic_allele": "a symbolic allele, such as <DEL> or <NON_REF>",
    "breakend": "a breakend",
    "not_acgtn": "an allele has other letters than A, C, G, T and N",
    "ref_equals_alt": "both alleles are the same",
    "no_such_contig": "the genome has no such contig",
    "beyond_contig": "the variant lies outside of the contig",
    "n_at_site": "the genome has N or another code for several bases there",
    "ref_mismatch": "the genome has other bases there than REF",
    "foreign_letters": "the genome has letters near it that are no nucleotides",
    "too_short": "the contig is too short for windows of 2 bases, without which nothing is predicted",
    "needs_causal_model": "an insertion or deletion, which a masked model cannot score",
}

_SCORABLE = re.compile("[ACGTN]+", re.IGNORECASE)
_NUCLEOTIDES = re.compile(f"[{''.join(IUPAC)}]*")
_MISSING = {"", ".", "NAN", "NA", "NONE", "NULL"}  # NA and NAN spell bases, but stand for an empty cell of a table
# From so many alleles that are not in the genome, and this share of those compared, it is another genome's.
_MANY, _LARGE_SHARE = 10, 0.2
_SOME, _MOST = 3, 0.5  # the same for all variants at the end


class Variant(NamedTuple):
    """One alternative allele at one place; `start` is 0-based, of the first base of `reference`."""

    contig: str
    start: int
    reference: str
    alternative: str


class VariantWindows(NamedTuple):
    """The letters around a variant with its reference and with its alternative allele, of one length.

    `start` is the place of the alleles' first bases, in both.
    """

    reference: str
    alternative: str
    start: int


def allele_status(reference: str, alternative: str) -> str:
    """Why these alleles cannot be scored, a word of `REASONS`, or "" if they can: A, C, G, T and N in either case.

    Example:

    >>> [allele_status("A", allele) for allele in ("c", "*", "<DEL>", "A,T", "G]17:198982]", "")]
    ['', 'spanning_deletion', 'symbolic_allele', 'several_alleles', 'breakend', 'missing_allele']
    """
    for allele in (reference, alternative):
        if status := _status_of_one(allele):
            return status
    if "N" in reference.upper():
        return "n_at_site"
    return "ref_equals_alt" if reference.upper() == alternative.upper() else ""


def _status_of_one(allele: str) -> str:
    if allele.strip().upper() in _MISSING:
        return "missing_allele"
    if _SCORABLE.fullmatch(allele):
        return ""
    if allele == "*":
        return "spanning_deletion"
    if set(allele) == {"-"}:
        return "gap_allele"
    if "[" in allele or "]" in allele or re.fullmatch(r"\.\w+|\w+\.", allele):
        return "breakend"
    if allele.startswith("<"):
        return "symbolic_allele"
    return "several_alleles" if re.search("[,;/|]", allele) else "not_acgtn"


class ReferenceCheck:
    """Compares reference alleles with a genome, and notices that it is another genome's variants that it is given.

    Args:
        genome: where they should be.
    """

    def __init__(self, genome: Genome):
        self.genome = genome
        self.compared = self.mismatches = self.unknown_contigs = 0
        self._example = ""

    def status(self, variant: Variant) -> str:
        """Why a variant cannot be scored, a word of `REASONS`, or "" if it can.

        Raises:
            InputError: if too many of the variants so far do not fit the genome.
        """
        status = allele_status(variant.reference, variant.alternative)
        if status and status != "n_at_site":
            return status
        try:
            contig = self.genome.contig(variant.contig)
        except InputError as error:
            self.unknown_contigs += 1
            self._example = self._example or str(error)
            self._stop_if(self.unknown_contigs >= _MANY and not self.compared)
            return "no_such_contig"
        end = variant.start + len(variant.reference)
        if variant.start < 0 or end > self.genome.contigs[contig]:
            return "beyond_contig"
        found = self.genome.fetch(contig, variant.start, end)
        if not has_only_nucleotides(found):
            return "foreign_letters"
        if set(found) - set(BASES):
            return "n_at_site"
        self.compared += 1
        if found != variant.reference.upper():
            self.mismatches += 1
            self._example = (
                f"at {variant.contig}:{variant.start + 1:,} REF is {shortened(variant.reference)}, but "
                f"{self.genome.name} has {shortened(found)}"
            )
            self._stop_if(self.mismatches >= _MANY and self.mismatches >= _LARGE_SHARE * self.compared)
            return "ref_mismatch"
        return status

    def finish(self) -> None:
        """Say at the end whether most of a few variants did not fit.

        Raises:
            InputError: if so.
        """
        self._stop_if(self.mismatches >= _SOME and self.mismatches > _MOST * self.compared)
        self._stop_if(self.unknown_contigs >= _SOME and not self.compared)

    def _stop_if(self, is_wrong: bool) -> None:
        if not is_wrong:
            return
        if self.mismatches:
            raise InputError(
                f"{self.mismatches} of {self.compared} reference alleles are not in the genome: {self._example}. "
                "Is it another assembly, or are the positions counted from 0?"
            )
        raise InputError(f"no contig of {self.unknown_contigs} variants is in the genome: {self._example}")


def variant_windows(
    genome: Genome | str, contig: str, start: int, reference: str, alternative: str, length: int
) -> VariantWindows:
    """Both alleles of a variant in their surroundings: windows of one length, with the variant in the middle.

    At the ends of a contig the window is shifted, not shortened. A deletion brings in letters from its right, an
    insertion pushes them out. With G a contig of L letters and N = `length`, the window starts at
    s = clip(start - N // 2, 0, L - N - max(0, len(reference) - len(alternative))); they are G[s : s + N] and
    (G[s : start] + alternative + G[start + len(reference) :])[:N]. Where the contig is too short for that, N is
    the largest number for which both windows have N letters: L, less what is deleted.

    Args:
        genome: a genome, or the one sequence that `start` counts in.
        start: 0-based, of the first base of `reference`.
        reference, alternative: alleles of A, C, G, T and N; `ReferenceCheck` says whether they can be scored.
        length: N, at least 1.

    Raises:
        ValueError: if the length is not positive, an allele is not DNA, or the reference allele is not there.

    Example:

    >>> variant_windows("AACCGGTTAA", "", 4, "GG", "T", 4)
    VariantWindows(reference='CCGG', alternative='CCTT', start=2)
    """
    if length < 1:
        raise ValueError(f"expected a window of at least 1 base, got {length}.")
    for allele in (reference, alternative):
        if not _SCORABLE.fullmatch(allele):
            raise ValueError(f"expected alleles of the letters A, C, G, T and N, got {shortened(allele)}.")
    if isinstance(genome, str):
        genome = genome_of({contig: genome}, "the sequence")
    contig = genome.contig(contig)
    end, size = start + len(reference), genome.contigs[contig]
    if start < 0 or end > size or genome.fetch(contig, start, end) != reference.upper():
        raise ValueError(
            f"expected the reference allele {shortened(reference)} at position {start} (0-based) of {genome.name}; is "
            "it another assembly, or are the positions 1-based?"
        )
    deleted = max(0, len(reference) - len(alternative))
    length = min(length, size - deleted)
    first = max(0, min(start - length // 2, size - length - deleted))
    left = genome.fetch(contig, first, start)
    missing = max(0, length - len(left) - len(alternative))
    right = genome.fetch(contig, end, end + missing)
    return VariantWindows(
        genome.fetch(contig, first, first + length), (left + alternative.upper() + right)[:length], start - first
    )


def has_only_nucleotides(letters: str) -> bool:
    """Whether all are IUPAC codes, in upper case."""
    return _NUCLEOTIDES.fullmatch(letters) is not None
