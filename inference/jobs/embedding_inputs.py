"""What `gengram embed` reads: sequences of FASTA, FASTQ and tables, and regions of a genome, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...sequences.genome import Genome, open_genome
from ...sequences.intervals import read_bed
from ...sequences.pieces import LONGEST_PIECE, SequencePiece, pieces_of
from ...sequences.sequence_files import stream_sequences
from ...sequences.tables import column_names, is_parquet, table_rows
from ...sequences.text_lines import whole_number
from ...support.errors import InputError, quoted, shortened
from ...support.input_file import open_input, shown_name
from ..embeddings import check_dna
from ..long_sequences import Stretch, stretches


class Passage(NamedTuple):
    """A sequence, or some bases of a long one with those around them that windows need.

    Args:
        name: of what `origin` counts on.
        text: letters of the forward strand.
        offset: place of the first letter of `text` in the sequence.
        start, end: bases that are wanted, of the sequence.
        length: bases of the sequence.
        origin: where the sequence begins in what has the name: that of a region in its contig; otherwise 0.
        strand: that the region is on, `.` if that is not said.
    """

    name: str
    text: str
    offset: int
    start: int
    end: int
    length: int
    origin: int = 0
    strand: str = "."

    @property
    def is_whole(self) -> bool:
        """Whether all of the sequence is wanted."""
        return self.end - self.start == self.length


@dataclass
class SequenceInput:
    """Sequences in a file.

    Args:
        path: FASTA or FASTQ, plain or compressed; a table; or BED, if there is a genome.
        fasta: the genome that BED is of.
        column: of the sequences in a table.

    Raises:
        InputError: if it is none of these, or a BED file without genome.
        OSError: if it cannot be read.
    """

    path: Path
    fasta: Path | None = None
    column: str = "sequence"
    kind: str = field(init=False)  # "records", "regions" or "table"
    _long: dict[int, dict[int, int]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.kind = self._kind()

    def passages(self, size: int, margin: int) -> Iterator[Passage]:
        """All sequences in the order of the file, those of more than `size` bases in parts.

        Args:
            size: bases of a part.
            margin: bases around a part that windows may need.

        Raises:
            InputError: if a sequence is empty or no DNA, a region is not in the genome, or the file is damaged.
        """
        if self.kind == "regions":
            return self._regions(size, margin)
        return self._table(size, margin) if self.kind == "table" else self._records(size, margin)

    def _kind(self) -> str:
        name = shown_name(self.path)
        if is_parquet(self.path):
            self._check_no_fasta("a table")
            return "table"
        with open_input(self.path, "FASTA, FASTQ, BED or a table") as file:
            line = file.peek(1).split(b"\n", 1)[0].decode("utf-8", "replace")
        if line.startswith((">", "@")):
            self._check_no_fasta("FASTA" if line.startswith(">") else "FASTQ")
            return "records"
        if self.fasta is not None:
            return "regions"
        cells = line.split()
        if len(cells) >= 3 and whole_number(cells[1]) is not None and whole_number(cells[2]) is not None:
            raise InputError(f"{name} looks like BED: name the genome that its regions are of with --fasta.")
        if self.column.lower() in column_names(self.path):
            return "table"
        if "\t" in line or "," in line:
            raise InputError(
                f"{name}: expected a column {self.column!r} in its first line, got {quoted(column_names(self.path))}; "
                "name the one that holds sequences with --sequence-column."
            )
        return "records"  # whose reader says what is wrong

    def _check_no_fasta(self, what: str) -> None:
        if self.fasta is not None:
            raise InputError(
                f"--fasta is the genome of a BED file, but {shown_name(self.path)} is {what}: leave it out."
            )

    def _records(self, size: int, margin: int) -> Iterator[Passage]:
        number = 0
        for part in stretches(stream_sequences(self.path), size, margin):
            is_whole = part.start == 0 and part.is_last
            length = part.end if is_whole else self._length(number, size)
            yield _checked(part, length, f"{shown_name(self.path)}, record {shortened(part.name)}")
            number += part.is_last

    def _length(self, number: int, size: int) -> int:
        """Bases of a record of more than `size`; the file is read for them once."""
        if size not in self._long:
            found, record, bases = {}, 0, 0
            for piece in stream_sequences(self.path, repeated_names="keep"):  # the first reading checks names
                bases += len(piece.text)
                if piece.is_last:
                    if bases > size:
                        found[record] = bases
                    record, bases = record + 1, 0
            self._long[size] = found
        return self._long[size][number]

    def _table(self, size: int, margin: int) -> Iterator[Passage]:
        column = self.column.lower()
        columns = [column, *(["name"] if "name" in column_names(self.path) and column != "name" else [])]
        for number, (where, cells) in enumerate(table_rows(self.path, columns), start=1):
            sequence, name = cells[0].strip(), cells[1] if len(cells) > 1 else str(number)
            for part in stretches(pieces_of(name, sequence), size, margin):
                yield _checked(part, len(sequence), where)

    def _regions(self, size: int, margin: int) -> Iterator[Passage]:
        assert self.fasta is not None
        with open_genome(self.fasta) as genome:
            for region in read_bed(self.path, genome.lengths):
                pieces = _pieces_of_region(genome, region.record, region.start, region.end)
                for part in stretches(pieces, size, margin):
                    passage = _checked(part, len(region), f"{genome.name}, {region}")
                    yield passage._replace(origin=region.start, strand=region.strand)


def _pieces_of_region(genome: Genome, contig: str, start: int, end: int) -> Iterator[SequencePiece]:
    name = genome.contig(contig)
    for place in range(start, end, LONGEST_PIECE):
        stop = min(place + LONGEST_PIECE, end)
        yield SequencePiece(name, place - start, genome.fetch(name, place, stop), stop == end)


def _checked(part: Stretch, length: int, where: str) -> Passage:
    check_dna(part.read(part.start, part.end), where, part.start)
    return Passage(part.name, part.text, part.offset, part.start, part.end, length)
