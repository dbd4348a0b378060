"""Genes from GTF and GFF3 files: exons, introns, a label for every base, and what lies in a region.

Both formats count bases from 1 and include the last one. Here as everywhere in this package coordinates are 0-based
and half-open, on the forward strand, also for transcripts of the reverse strand.

Read here and not by gffutils, which first makes a database: 17.7 s for the genes of yeast, where this takes 0.6 s.
pysam reads annotation that is sorted and indexed, and most is not.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from ..support.errors import InputError, quoted, shortened
from ..support.input_file import shown_name
from ..support.printable import printable
from .contig_names import same_contig
from .text_lines import read_lines, whole_number

logger = logging.getLogger(__name__)

LABELS = {"exon": ("other", "exon"), "splice": ("other", "donor", "acceptor")}

_CODING = ("CDS", "stop_codon")  # in GTF a stop codon is not part of its CDS
_IS_GFF3 = re.compile(r'\s*[^\s="]+=')  # GTF separates names from values by blanks
_MOST_STEPS_TO_A_GENE = 8  # from an exon, by way of parents


@dataclass(frozen=True)
class Transcript:
    """One transcript on one strand of one record.

    Args:
        record: name of the sequence that it lies on.
        name: its `transcript_id`.
        strand: `+` or `-`.
        exons: (start, end) of each exon, in the order of the forward strand, with at least one base between two.
    """

    record: str
    name: str
    strand: str
    exons: tuple[tuple[int, int], ...]

    @property
    def introns(self) -> list[tuple[int, int]]:
        """(start, end) of what lies between two exons, in the order of the forward strand."""
        return [(left[1], right[0]) for left, right in zip(self.exons[:-1], self.exons[1:], strict=True)]

    @property
    def donors(self) -> list[int]:
        """First base of each intron as it is transcribed: the G of GT."""
        return [start if self.strand == "+" else end - 1 for start, end in self.introns]

    @property
    def acceptors(self) -> list[int]:
        """Last base of each intron as it is transcribed: the G of AG."""
        return [end - 1 if self.strand == "+" else start for start, end in self.introns]


@dataclass(frozen=True)
class Gene:
    """A gene with what its transcripts have together.

    Args:
        record: name of the sequence that it lies on.
        name: its name, or its identifier if it has none.
        strand: `+`, `-`, or `.` if it is not known.
        start, end: its bounds.
        exons: (start, end) of what is an exon in any transcript, with at least one base between two.
        coding: likewise, of what is translated in any transcript.
    """

    record: str
    name: str
    strand: str
    start: int
    end: int
    exons: tuple[tuple[int, int], ...]
    coding: tuple[tuple[int, int], ...]


def read_transcripts(path: str | Path) -> list[Transcript]:
    """Transcripts of the `exon` lines of a GTF or GFF3 file, plain or compressed, in the order of the file.

    Exons of a transcript that touch or overlap become one. Equal names on two records or strands are two transcripts.

    Raises:
        InputError: if a line is not GTF or GFF3, an exon has no strand or no transcript, or there are no exons; the
            message names the line.
        OSError: if the file cannot be read.
    """
    exons: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for line in _lines(path):
        if line.feature != "exon":
            continue
        start, end = line.bounds()
        if line.strand not in ("+", "-"):
            raise InputError(
                f"{line.here}: expected the strand + or -, got {shortened(line.strand)}; remove exons of unknown "
                "strand."
            )
        names = line.parents() if line.is_gff3 else [line.attribute("transcript_id")]
        if not any(names):
            expected = "Parent=..." if line.is_gff3 else 'transcript_id "..."'
            raise InputError(f"{line.here}: expected {expected}, got {shortened(line.attributes[:60])}.")
        for name in names:
            exons.setdefault((line.record, name, line.strand), []).append((start, end))
    if not exons:
        raise InputError(f"{shown_name(path)}: expected lines of the feature 'exon', got none.")
    return [Transcript(record, name, strand, _joined(parts)) for (record, name, strand), parts in exons.items()]


def read_genes(path: str | Path, record: str, start: int, end: int) -> list[Gene]:
    """Genes that lie at least in part between two bases of a record, by their first base.

    Exons of all transcripts are put together, and so are their coding parts. A gene without exons consists of its
    coding parts, and without these of itself. Names of records match with and without `chr`; a warning says if the
    file has none of this name.

    Args:
        path: GTF or GFF3, plain or compressed.
        record, start, end: the region, 0-based and half-open.

    Raises:
        InputError: if a line is not GTF or GFF3, or its bounds are not numbers; the message names the line.
        OSError: if the file cannot be read.
    """
    parts = _GeneParts()
    others: dict[str, None] = {}
    is_same: dict[str, bool] = {}
    for line in _lines(path):
        if is_same.setdefault(line.record, same_contig(line.record, record)):
            parts.add(line)
        elif len(others) < 5:
            others[line.record] = None
    if not any(is_same.values()):
        logger.warning("%s has no line of %s; its records are %s.", shown_name(path), record, quoted(others, limit=5))
    genes = [gene for gene in parts.genes(record) if gene.start < end and gene.end > start]
    return sorted(genes, key=lambda gene: (gene.start, gene.end, gene.name))


def base_labels(transcripts: Iterable[Transcript], strand: str, length: int, kind: str) -> np.ndarray:
    """Class of each base of one strand of a record: (length,) int8, an index into `LABELS[kind]`.

    The order is that of the forward strand, so for the reverse complement of a window turn its labels around. Genes
    of the other strand count as `other`. `exon` is what is an exon in any transcript. `splice` marks the first and
    the last base of each intron of any transcript; a base that is both is a donor.

    Args:
        transcripts: of this record.
        strand: `+` or `-`.
        length: bases of the record.
        kind: `exon` or `splice`.

    Raises:
        ValueError: if `kind` or `strand` is not known, or a transcript ends behind the record.
    """
    if kind not in LABELS or strand not in ("+", "-"):
        raise ValueError(f"expected labels of {list(LABELS)} and a strand + or -, got {kind!r} and {strand!r}.")
    labels = np.zeros(length, dtype=np.int8)
    transcripts = [transcript for transcript in transcripts if transcript.strand == strand]
    for transcript in transcripts:
        if transcript.exons[-1][1] > length:
            raise InputError(
                f"transcript {printable(transcript.name)} ends at base {transcript.exons[-1][1]}, but "
                f"{printable(transcript.record)} has {length}; are FASTA and GTF of the same assembly?"
            )
    if kind == "exon":
        for transcript in transcripts:
            for start, end in transcript.exons:
                labels[start:end] = LABELS["exon"].index("exon")
        return labels
    for site in ("acceptor", "donor"):
        for transcript in transcripts:
            labels[transcript.acceptors if site == "acceptor" else transcript.donors] = LABELS["splice"].index(site)
    return labels


class _Line(NamedTuple):
    """A line of GTF or GFF3."""

    record: str
    feature: str
    first: str
    last: str
    strand: str
    attributes: str
    here: str  # file and line, for errors

    @property
    def is_gff3(self) -> bool:
        return _IS_GFF3.match(self.attributes) is not None

    def bounds(self) -> tuple[int, int]:
        start, end = whole_number(self.first), whole_number(self.last)
        if start is None or end is None or not 1 <= start <= end:
            raise InputError(
                f"{self.here}: expected 1 <= start <= end, got {shortened(self.first)} and {shortened(self.last)}."
            )
        return start - 1, end

    def attribute(self, *names: str) -> str:
        """The value of the first of these attributes that there is, or nothing."""
        for name in names:
            pattern = rf"(?:^|;)\s*{name}=([^;]*)" if self.is_gff3 else rf'(?:^|;)\s*{name}\s+"?([^";]+)"?'
            if found := re.search(pattern, self.attributes):
                return unquote(found[1]) if self.is_gff3 else found[1]
        return ""

    def parents(self) -> list[str]:
        """Identifiers of what a line of GFF3 is part of."""
        found = re.search(r"(?:^|;)\s*Parent=([^;]*)", self.attributes)
        return [unquote(word) for word in found[1].split(",")] if found else []


def _lines(path: str | Path) -> Iterator[_Line]:
    source = shown_name(path)
    for number, text in enumerate(read_lines(path, "GTF or GFF3"), start=1):
        if text.startswith("##FASTA"):  # sequences follow, to the end of a GFF3 file
            return
        if not text.strip() or text.startswith("#"):
            continue
        cells = text.split("\t")
        if len(cells) != 9:
            raise InputError(
                f"{source}, line {number}: expected 9 tab-separated columns (GTF or GFF3), got {len(cells)}."
            )
        record, _, feature, first, last, _, strand, _, attributes = cells
        yield _Line(record, feature, first, last, strand, attributes, f"{source}, line {number}")


class _Part(NamedTuple):
    """What a line says of a gene, or of something that belongs to one."""

    owner: str  # identifier
    feature: str
    start: int
    end: int
    strand: str


class _GeneParts:
    """Collects the lines of a record, in which genes may come before or after their exons."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.names: dict[str, str] = {}  # of what has an identifier
        self.parents: dict[str, str] = {}  # in GFF3: of transcripts, and of parts of transcripts

    def add(self, line: _Line) -> None:
        start, end = line.bounds()
        if line.is_gff3:
            owners = self._owners_in_gff3(line)
        elif owner := line.attribute("gene_id"):
            owners = [owner]
            self.names[owner] = self.names.get(owner) or line.attribute("gene_name", "gene")
        else:
            owners = []
        self.parts += [_Part(owner, line.feature, start, end, line.strand) for owner in owners]

    def _owners_in_gff3(self, line: _Line) -> list[str]:
        identifier, parents = line.attribute("ID"), line.parents()
        if identifier and line.feature not in ("exon", *_CODING):
            self.names.setdefault(identifier, line.attribute("Name", "gene_name", "gene"))
            if parents:
                self.parents.setdefault(identifier, parents[0])
        if parents:
            return parents
        return [identifier] if identifier and "gene" in line.feature else []

    def genes(self, record: str) -> Iterator[Gene]:
        of_genes: dict[tuple[str, str], dict[str, list[_Part]]] = {}  # strands apart: some identifiers occur on both
        for part in self.parts:
            kind = "coding" if part.feature in _CODING else "exons" if part.feature == "exon" else "others"
            kinds = of_genes.setdefault((self._gene_of(part.owner), part.strand), {})
            kinds.setdefault(kind, []).append(part)
        for (identifier, strand), kinds in of_genes.items():
            parts = [part for found in kinds.values() for part in found]
            start, end = min(part.start for part in parts), max(part.end for part in parts)
            exons, coding = ([(p.start, p.end) for p in kinds.get(kind, [])] for kind in ("exons", "coding"))
            yield Gene(
                record,
                self.names.get(identifier) or identifier,
                strand,
                start,
                end,
                _joined(exons or coding or [(start, end)]),
                _joined(coding),
            )

    def _gene_of(self, identifier: str) -> str:
        """What something belongs to in the end."""
        for _ in range(_MOST_STEPS_TO_A_GENE):
            if identifier not in self.parents:
                break
            identifier = self.parents[identifier]
        return identifier


def _joined(exons: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(exons):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)
