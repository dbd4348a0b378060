"""Genomes: sequences by name, of which any part can be read."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..support.decompression import is_bgzip
from ..support.errors import InputError, quoted, shortened
from ..support.input_file import is_read_once, open_input, shown_name
from .contig_names import other_names
from .fasta_index import index_of_fasta
from .htslib import load_pysam, quiet_pysam

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16  # bases that are read and kept at once
_COPY_BLOCK = 1 << 20


class Genome:
    """Sequences by name; use it in a `with` block.

    Args:
        contigs: lengths by name, in the order of the file.
        read: the letters of a contig from a start to an end, 0-based and half-open, in either case.
        name: what messages call it.
        close: called at the end.
    """

    def __init__(
        self,
        contigs: Mapping[str, int],
        read: Callable[[str, int, int], str],
        name: str = "the genome",
        close: Callable[[], Any] | None = None,
    ):
        self.contigs = dict(contigs)
        self.name = name
        self._read, self._close = read, close
        self._names: dict[str, str] = {}
        self._block: tuple[str, int, str] = ("", 0, "")  # contig, start and letters of what was read last

    def __enter__(self) -> "Genome":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and remove what was written for it."""
        if self._close is not None:
            self._close()
            self._close = None

    def contig(self, name: str) -> str:
        """The genome's own name of a contig, which may differ in a leading `chr`, or M from MT.

        Raises:
            InputError: if there is no such contig; the message names the nearest.
        """
        if name in self.contigs:
            return name
        if name not in self._names:
            found = [other for other in other_names(name) if other in self.contigs]
            if not found:
                raise InputError(
                    f"{self.name} has no contig {quoted([name], list(self.contigs))}; its contigs are "
                    f"{quoted(self.contigs, limit=5)}."
                )
            if not self._names:
                logger.warning(
                    "Contigs of %s have other names: %s is read as %s, and so on.", self.name, name, found[0]
                )
            self._names[name] = found[0]
        return self._names[name]

    @property
    def lengths(self) -> Mapping[str, int]:
        """Bases of each contig, also by the other names that `contig` understands."""
        return _Lengths(self)

    def fetch(self, contig: str, start: int, end: int) -> str:
        """Letters of a contig, 0-based and half-open, in upper case, U as T; N and other IUPAC codes are kept.

        Raises:
            InputError: if there is no such contig, it does not reach so far, or the file is damaged.
        """
        contig = self.contig(contig)
        length = self.contigs[contig]
        if not 0 <= start <= end <= length:
            raise InputError(
                f"{self.name}: expected a part of {shortened(contig)}, which has {length:,} bases, got {start:,} to "
                f"{end:,} (0-based, half-open)."
            )
        kept, first, letters = self._block
        if contig != kept or start < first or end > first + len(letters):
            first = start - start % _BLOCK
            letters = self._read_block(contig, first, min(length, max(first + _BLOCK, end)))
            self._block = (contig, first, letters)
        return letters[start - first : end - first]

    def _read_block(self, contig: str, start: int, end: int) -> str:
        try:
            letters = self._read(contig, start, end) if end > start else ""
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.name} is damaged near {contig}:{start + 1:,}-{end:,}: {error}.") from None
        if len(letters) != end - start:
            raise InputError(
                f"{self.name} is damaged: expected {end - start:,} bases at {contig}:{start + 1:,}-{end:,}, got "
                f"{len(letters):,}; copy or download the file again."
            )
        return letters.upper().replace("U", "T")


class _Lengths(Mapping[str, int]):
    def __init__(self, genome: Genome):
        self._genome = genome

    def __getitem__(self, name: str) -> int:
        return self._genome.contigs[self._genome.contig(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            name in self._genome.contigs or any(other in self._genome.contigs for other in other_names(name))
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._genome.contigs)

    def __len__(self) -> int:
        return len(self._genome.contigs)


def genome_of(sequences: Mapping[str, str], name: str = "the genome") -> Genome:
    """A genome of sequences that are in memory.

    Example:

    >>> from gengram.sequences.genome import genome_of
    >>> genome_of({"chr1": "acgtn"}).fetch("1", 1, 5)
    'CGTN'
    """
    lengths = {contig: len(sequence) for contig, sequence in sequences.items()}
    return Genome(lengths, lambda contig, start, end: sequences[contig][start:end], name)


def open_genome(path: str | Path) -> Genome:
    """The genome in a FASTA file, of which parts are read; memory is bounded.

    Its index (`.fai`, and `.gzi` of bgzip) is made if there is none, or if it does not match the file. What cannot be
    read in parts (gzip that is not bgzip, bzip2, xz, a pipe) is first decompressed into a temporary file.

    Raises:
        InputError: if it is no FASTA, or damaged, or two records have one name.
        MissingExtraError: if pysam is not installed.
        OSError: if the file cannot be read.
    """
    name = shown_name(path)
    pysam = load_pysam()
    with contextlib.ExitStack() as stack:

        def new_folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gengram-genome-")))

        file = _readable_in_parts(path, name, new_folder)
        index = index_of_fasta(file, name, new_folder)
        if not index.lengths:
            raise InputError(f"{name}: expected at least one FASTA record, got none.")
        gzi = None if index.gzi is None else str(index.gzi)
        reader = stack.enter_context(
            pysam.FastaFile(str(file), filepath_index=str(index.fai), filepath_index_compressed=gzi)
        )

        def read(contig: str, start: int, end: int) -> str:
            with quiet_pysam():
                return str(reader.fetch(contig, start, end))

        return Genome(index.lengths, read, name, stack.pop_all().close)


def _readable_in_parts(path: str | Path, name: str, new_folder: Callable[[], Path]) -> Path:
    """The file itself if it is plain or bgzip FASTA, or a decompressed copy of it in a new folder."""
    with open_input(path, "FASTA") as content:
        start = content.peek(_COPY_BLOCK)
        if not start.lstrip().startswith(b">"):
            raise InputError(
                f"{name}: expected FASTA ('>' and a name), got {shortened(start[:40].decode(errors='replace'))}."
            )
        if not is_read_once(path):
            with open(path, "rb") as raw:
                beginning = raw.read(18)
            if is_bgzip(beginning) or beginning.lstrip().startswith(b">"):
                return Path(path)
        copy = new_folder() / "genome.fa"
        logger.warning("%s cannot be read in parts: it is decompressed into a temporary file first.", name)
        with open(copy, "wb") as file:
            while block := content.read(_COPY_BLOCK):
                file.write(block)
        return copy
