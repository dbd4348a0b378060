"""Reads FASTA files, plain or compressed, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..support.errors import InputError
from ..support.input_file import open_input, shown_name
from ..support.printable import printable
from .pieces import LONGEST_PIECE, SequencePiece, whole_records

LONGEST_HEADER = 1 << 20  # bytes
REPEATED_NAMES = ("fail", "number", "keep")

_LETTERS = bytes(range(0x21, 0x7F)) + b" \t\n"  # what the lines of a sequence may hold
_MOST_BLANKS = 1 << 16  # at the end of a line
# How the first line starts in formats that are often given in place of FASTA, and what they are.
_OTHER_FORMATS = (
    (b"@", "FASTQ, or SAM"),
    (b"##fileformat=VCF", "VCF"),
    (b"##gff-version", "GFF"),
    (b"LOCUS ", "GenBank; write it as FASTA first"),
    (b"ID  ", "EMBL; write it as FASTA first"),
    (b"CLUSTAL", "a Clustal alignment; write it as FASTA first"),
    (b"#NEXUS", "NEXUS; write it as FASTA first"),
    (b"{", "JSON"),
)


def stream_fasta(path: str | Path, digest: Any = None, repeated_names: str = "fail") -> Iterator[SequencePiece]:
    r"""The records of a FASTA file, in its order, as pieces of at most 1 Mi bases; case is kept.

    A record's name is the first word of its header. Blank lines, blanks at the end of a line, `\r\n` and `\r` are no
    part of a sequence; every other character is. Memory does not grow with records' lengths; their names are kept, at
    about 150 bytes each, unless `repeated_names` is `keep`.

    Args:
        path: the file, plain or compressed; `-` is standard input, and pipes can be read.
        digest: a hash of `hashlib`, updated with the file's bytes as they are on the disk.
        repeated_names: what to do about a name that was there before: `fail`, `number` (`chr1#2`), or `keep`.

    Raises:
        InputError: if the file is damaged or not FASTA text: something stands in front of the first header, a record
            has no name or one that was there before (`fail`), a line holds `>` in its middle, starts with `;`, or
            has bytes that are not printable ASCII. The message names the line.
        OSError: if it cannot be read.
    """
    with open_input(path, "FASTA", digest) as file:
        yield from fasta_pieces(file, shown_name(path), repeated_names)


def read_fasta(path: str | Path, repeated_names: str = "fail") -> Iterator[tuple[str, str]]:
    """Name and sequence of each record, in the order of the file; otherwise as `stream_fasta`."""
    return whole_records(stream_fasta(path, repeated_names=repeated_names))


def fasta_pieces(file: BinaryIO, source: str, repeated_names: str = "fail") -> Iterator[SequencePiece]:
    """`stream_fasta` of an open file that errors call `source`."""
    if repeated_names not in REPEATED_NAMES:
        raise InputError(f"expected repeated_names as one of {', '.join(REPEATED_NAMES)}, got {repeated_names!r}.")
    parser = _Parser(source, repeated_names)
    for block in _blocks_of_lines(file):
        yield from parser.feed(block)
    yield from parser.end()


def _blocks_of_lines(file: BinaryIO) -> Iterator[bytes]:
    r"""The file with `\n` as the only line end."""
    waiting = b""
    while block := file.read(LONGEST_PIECE // 2):
        block = waiting + block
        waiting = b"\r" if block.endswith(b"\r") else b""  # its line feed may come with the next block
        block = block.removesuffix(waiting)
        yield block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block
    if waiting:
        yield b"\n"


class _Parser:
    """Makes pieces of blocks of bytes; what may not have ended yet waits in it."""

    def __init__(self, source: str, repeated_names: str):
        self.source, self.repeated_names = source, repeated_names
        self.lines_of_names: dict[str, int] = {}
        self.numbers_of_names: dict[str, int] = {}
        self.line = 1  # that the next byte is in
        self.is_line_start = True
        self.header: bytes | None = None
        self.name: str | None = None
        self.description = ""
        self.start = 0  # of `waiting` in the record
        self.waiting = ""  # the last piece of the record so far
        self.blanks = b""  # at the end of a line so far

    def feed(self, block: bytes) -> Iterator[SequencePiece]:
        place = 0
        while place < len(block):
            if self.header is not None:
                place = self._read_header(block, place)
                continue
            stop = block.find(b">", place)
            stop = stop if stop >= 0 else len(block)
            if stop > place:
                yield from self._read_lines(block[place:stop])
            if stop < len(block):
                if not self.is_line_start:
                    raise self._error("'>' stands in the middle of a line; does the record before lack a line end?")
                if self.name is not None:
                    yield self._last_piece(self.name)
                self.header = b""
            place = stop + 1

    def end(self) -> Iterator[SequencePiece]:
        if self.header is not None:
            self._begin_record(self.header)
        if self.name is None:
            raise InputError(f"{self.source}: expected at least one FASTA record, got none.")
        yield self._last_piece(self.name)

    def _read_header(self, block: bytes, place: int) -> int:
        """Reads a header on; returns the place behind what was read."""
        end = block.find(b"\n", place)
        header = (self.header or b"") + block[place : end if end >= 0 else len(block)]
        if len(header) > LONGEST_HEADER:
            raise self._error(f"expected a header of at most {LONGEST_HEADER:,} bytes, got more")
        if end < 0:
            self.header = header
            return len(block)
        self._begin_record(header)
        self.line += 1
        return end + 1

    def _begin_record(self, header: bytes) -> None:
        words = header.split(None, 1)
        if not words:
            raise self._error("expected a name after '>', got none")
        try:
            name = words[0].decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("expected a name in UTF-8, got bytes that are not text") from None
        if not name.isprintable() or b"\0" in header:
            raise self._error(f"expected a name of characters that can be shown, got '{printable(name)}'")
        if self.repeated_names != "keep":
            name = self._unique(name)
        self.name, self.start, self.header, self.is_line_start = name, 0, None, True
        self.description = b"".join(words[1:]).rstrip().decode("utf-8", "surrogateescape")

    def _unique(self, name: str) -> str:
        original = name
        while self.lines_of_names.setdefault(name, self.line) != self.line:
            if self.repeated_names == "fail":
                raise self._error(
                    f"the name '{printable(name)}' (the first word) was used in line {self.lines_of_names[name]} "
                    "already; rename one of the two (`gengram prepare` can number them: --repeated-names number)"
                )
            self.numbers_of_names[original] = self.numbers_of_names.get(original, 1) + 1
            name = f"{original}#{self.numbers_of_names[original]}"
        return name

    def _read_lines(self, segment: bytes) -> Iterator[SequencePiece]:
        if self.name is None:
            self._check_that_nothing_is_in(segment)
        elif strange := segment.translate(None, _LETTERS):
            what = f"expected letters, got the byte 0x{strange[0]:02x}, which is not printable ASCII"
            raise self._error(what, segment[: segment.index(strange[:1])])
        comment = 0 if self.is_line_start and segment.startswith(b";") else (segment.find(b"\n;") + 1 or None)
        if comment is not None:
            raise self._error("a line starts with ';', which is a comment to some programs", segment[:comment])
        self.line += segment.count(b"\n")
        self.is_line_start = segment.endswith(b"\n")
        text = self._without_blanks(segment).translate(None, b"\n").decode("ascii")
        if text and self.waiting and self.name is not None:
            yield SequencePiece(self.name, self.start, self.waiting, False, self.description)
            self.start += len(self.waiting)
        self.waiting = text or self.waiting

    def _check_that_nothing_is_in(self, segment: bytes) -> None:
        """In front of the first header."""
        text = segment.lstrip(b" \t\n")
        if text:
            known = next(
                (f" (this looks like {name})" for start, name in _OTHER_FORMATS if text.startswith(start)), ""
            )
            first = text.split(b"\n", 1)[0][:40].decode("ascii", "backslashreplace")
            what = f"expected FASTA ('>' and a name), got '{printable(first)}'{known}"
            raise self._error(what, segment[: len(segment) - len(text)])

    def _without_blanks(self, segment: bytes) -> bytes:
        """The segment without blanks at the ends of lines; at its own end they wait for what follows."""
        segment, self.blanks = self.blanks + segment, b""
        if b" " not in segment and b"\t" not in segment:
            return segment
        lines = segment.split(b"\n")
        kept = [line.rstrip(b" \t") for line in lines]
        self.blanks = lines[-1][len(kept[-1]) :]
        if len(self.blanks) > _MOST_BLANKS:
            raise self._error(f"expected letters, got more than {_MOST_BLANKS:,} blanks")
        return b"\n".join(kept)

    def _last_piece(self, name: str) -> SequencePiece:
        piece = SequencePiece(name, self.start, self.waiting, True, self.description)
        self.waiting, self.blanks = "", b""
        return piece

    def _error(self, what: str, before: bytes = b"") -> InputError:
        """An error in the line that follows the bytes `before` of what is being read."""
        return InputError(f"{self.source}, line {self.line + before.count(bytes([10]))}: {what}.")
