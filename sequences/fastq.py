"""Reads FASTQ files, plain or compressed: four lines per record."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..support.errors import InputError
from ..support.input_file import open_input, shown_name
from ..support.printable import printable
from .pieces import SequencePiece, pieces_of

LONGEST_READ = 1 << 26  # bases; the longest known have some millions

_GRAPHIC = bytes(range(0x21, 0x7F))


def stream_fastq(path: str | Path, digest: Any = None) -> Iterator[SequencePiece]:
    r"""The records of a FASTQ file, in its order, as pieces of at most 1 Mi bases; qualities are checked and left out.

    A record's name is the first word behind `@`; names may occur again, as those of paired reads do.

    Args:
        path: the file, plain or compressed; `-` is standard input, and pipes can be read.
        digest: a hash of `hashlib`, updated with the file's bytes as they are on the disk.

    Raises:
        InputError: if the file is damaged, a record is not four lines, has no name, or as many qualities as bases, or
            a line holds more than `LONGEST_READ` bytes. The message names the line.
        OSError: if it cannot be read.
    """
    with open_input(path, "FASTQ", digest) as file:
        yield from fastq_pieces(file, shown_name(path))


def fastq_pieces(file: BinaryIO, source: str) -> Iterator[SequencePiece]:
    """`stream_fastq` of an open file that errors call `source`."""
    number = 0
    while (header := _line(file, source, number + 1)) is not None:
        if not header.strip():
            _check_that_nothing_follows(file, source, number + 1)
            break
        words = header[1:].split(None, 1)
        if not header.startswith(b"@") or not words:
            shown = printable(header[:40].decode("ascii", "backslashreplace"))
            raise InputError(f"{source}, line {number + 1}: expected FASTQ ('@' and a name), got '{shown}'.")
        name = _name(words[0], source, number + 1)
        bases, plus, qualities = (_line(file, source, number + 1 + offset) for offset in (1, 2, 3))
        if bases is None or plus is None or qualities is None:
            raise InputError(f"{source}, line {number + 1}: its record '{name}' is cut off; copy the file again.")
        if not plus.startswith(b"+") or plus[1:].strip() not in (b"", header[1:].strip()):
            raise InputError(
                f"{source}, line {number + 3}: expected '+', and behind it nothing or the record's header again; "
                "sequences of several lines are not read."
            )
        for offset, line in ((2, bases), (4, qualities)):
            if strange := line.translate(None, _GRAPHIC):
                raise InputError(
                    f"{source}, line {number + offset}: expected printable ASCII without blanks, got the byte "
                    f"0x{strange[0]:02x}."
                )
        if len(bases) != len(qualities):
            raise InputError(
                f"{source}, line {number + 4}: expected as many qualities as the record '{name}' has bases "
                f"({len(bases):,}), got {len(qualities):,}."
            )
        yield from pieces_of(name, bases.decode("ascii"))
        number += 4
    if number == 0:
        raise InputError(f"{source}: expected at least one FASTQ record, got none.")


def _line(file: BinaryIO, source: str, number: int) -> bytes | None:
    """The next line without its end; None at the end of the file."""
    line = file.readline(LONGEST_READ + 1)
    if len(line) > LONGEST_READ:
        raise InputError(f"{source}, line {number}: expected at most {LONGEST_READ:,} bytes, got more.")
    return line.removesuffix(b"\n").removesuffix(b"\r") if line else None


def _name(word: bytes, source: str, number: int) -> str:
    name = word.decode("utf-8", "surrogateescape")
    if not name.isprintable():
        raise InputError(
            f"{source}, line {number}: expected a name of characters that can be shown, got '{printable(name)}'."
        )
    return name


def _check_that_nothing_follows(file: BinaryIO, source: str, blank: int) -> None:
    number = blank
    while (line := _line(file, source, number := number + 1)) is not None:
        if line.strip():
            raise InputError(f"{source}, line {blank}: expected a record ('@' and a name), got a blank line.")
