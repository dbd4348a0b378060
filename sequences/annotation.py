"""Genes from GTF files: exons, introns, and a label for every base.

GTF counts bases from 1 and includes the last one. Here as everywhere in this package coordinates are 0-based and
half-open, on the forward strand, also for transcripts of the reverse strand.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..support.errors import InputError, shortened
from ..support.input_file import shown_name
from ..support.printable import printable
from .text_lines import read_lines, whole_number

LABELS = {"exon": ("other", "exon"), "splice": ("other", "donor", "acceptor")}

_TRANSCRIPT = re.compile(r'(?:^|;)\s*transcript_id\s+"?([^";]+)"?')


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


def read_transcripts(path: str | Path) -> list[Transcript]:
    """Transcripts of the `exon` lines of a GTF file, plain or compressed, in the order of the file.

    Exons of a transcript that touch or overlap become one. Equal names on two records or strands are two transcripts.

    Raises:
        InputError: if a line is not GTF, an exon has no strand or no transcript, or there are no exons; the message
            names the line.
        OSError: if the file cannot be read.
    """
    exons: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    source = shown_name(path)
    for number, line in enumerate(read_lines(path, "GTF"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        here = f"{source}, line {number}"
        cells = line.split("\t")
        if len(cells) != 9:
            raise InputError(f"{here}: expected 9 tab-separated columns (GTF), got {len(cells)}.")
        record, _, feature, first, last, _, strand, _, attributes = cells
        if feature != "exon":
            continue
        start, end = whole_number(first), whole_number(last)
        if start is None or end is None or not 1 <= start <= end:
            raise InputError(f"{here}: expected 1 <= start <= end, got {shortened(first)} and {shortened(last)}.")
        if strand not in ("+", "-"):
            raise InputError(
                f"{here}: expected the strand + or -, got {shortened(strand)}; remove exons of unknown strand."
            )
        found = _TRANSCRIPT.search(attributes)
        if found is None:
            hint = "; this looks like GFF3: convert it, for example with `gffread -T`" if "=" in attributes else ""
            raise InputError(f'{here}: expected transcript_id "...", got {attributes[:60]!r}{hint}.')
        exons.setdefault((record, found[1], strand), []).append((start - 1, end))
    if not exons:
        raise InputError(f"{source}: expected lines of the feature 'exon', got none.")
    return [Transcript(record, name, strand, _joined(parts)) for (record, name, strand), parts in exons.items()]


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


def _joined(exons: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(exons):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)
