"""Writes FASTA files, plain or compressed, in bounded memory."""

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..support.errors import InputError

FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")

_LINE = 80  # bases


def is_fasta_name(path: Path) -> bool:
    """Whether a name says that its file is FASTA."""
    return path.name.lower().endswith(FASTA_SUFFIXES)


def check_fasta_output(path: Path) -> None:
    """Refuse an output whose name does not say that it is FASTA.

    Raises:
        InputError: for another ending.
    """
    if not is_fasta_name(path):
        raise InputError(f"--output: expected a name that ends in {', '.join(FASTA_SUFFIXES)}, got {path.name!r}.")


class FastaWriter:
    """Writes records, each as a header and its bases in lines of 80.

    Args:
        file: is written to; it stays open.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._column = 0  # of the line that is being written

    def begin(self, name: str, description: str = "") -> None:
        """The header of the next record."""
        self.end()
        header = f">{name} {description}".rstrip()
        self._file.write(header.encode("utf-8", "surrogateescape") + b"\n")

    def add(self, bases: str) -> None:
        """Bases of the record that was begun, behind those before."""
        first = (_LINE - self._column) % _LINE
        lines = [bases[:first]] if first else []
        lines += [bases[start : start + _LINE] for start in range(first, len(bases), _LINE)]
        for line in filter(None, lines):
            self._column = (self._column + len(line)) % _LINE
            self._file.write(line.encode() + (b"" if self._column else b"\n"))

    def end(self) -> None:
        """The end of the last line."""
        if self._column:
            self._file.write(b"\n")
            self._column = 0


@contextlib.contextmanager
def fasta_output(path: Path) -> Iterator[FastaWriter]:
    """A FASTA file to be written, compressed if its name ends in `.gz`; the same records give the same bytes."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO = stack.enter_context(path.open("wb"))
        if path.name.lower().endswith(".gz"):
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))  # type: ignore
        writer = FastaWriter(file)
        yield writer
        writer.end()
