"""Indexes of FASTA files (`.fai`, and `.gzi` of bgzip): found, compared with the file, and made where there is none.

Formats: `man 5 faidx` (htslib), and the SAM specification, section 4.1, for bgzip.
"""

import bisect
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from ..support.decompression import is_bgzip, refuse_cut_bgzip
from ..support.errors import InputError, shortened
from .htslib import quiet_pysam
from .text_lines import read_lines

logger = logging.getLogger(__name__)

_MOST_OF_A_HEADER = 1 << 20  # bytes between two records
_REWRAP = "write it anew with lines of one length, for example with `seqkit seq -w 60`"


class FastaIndex(NamedTuple):
    """Index files of a FASTA file, and the lengths of its records by name, in their order."""

    fai: Path
    gzi: Path | None  # of bgzip
    lengths: dict[str, int]


def index_of_fasta(path: Path, name: str, private_folder: Callable[[], Path]) -> FastaIndex:
    """The index of a FASTA file, plain or bgzip: the one beside it if it matches the file, or a new one.

    A new index is put beside the file, where other programs find it too, or into the private folder if that cannot be
    written.

    Args:
        path: the file.
        name: what errors call it.
        private_folder: makes a folder.

    Raises:
        InputError: if no index can be made of the file, its end is missing, or two records have one name, or one none.
    """
    refuse_cut_bgzip(path, name)
    with open(path, "rb") as file:
        is_compressed = is_bgzip(file.read(18))
    beside = _names(path.parent, path, is_compressed)
    if all(index.exists() for index in beside):
        try:
            return _compared(path, name, *beside)
        except _MismatchError as mismatch:
            logger.warning("%s does not fit its file (%s), so a new index is made.", beside[0], mismatch)
    try:
        made = _make(path, name, path.parent, is_compressed)
    except OSError:
        logger.warning("The index of %s is made in every run: nothing can be written beside it.", name)
        made = _make(path, name, private_folder(), is_compressed)
    try:
        return _compared(path, name, *made)
    except _MismatchError as mismatch:
        raise InputError(f"{name}: expected FASTA that can be indexed, but {mismatch}; {_REWRAP}.") from None


class _MismatchError(Exception):
    """An index is not that of its file; the message says why."""


def _names(folder: Path, path: Path, is_compressed: bool) -> list[Path]:
    return [folder / f"{path.name}{ending}" for ending in ((".fai", ".gzi") if is_compressed else (".fai",))]


def _make(path: Path, name: str, folder: Path, is_compressed: bool) -> list[Path]:
    """Index files of `path` in `folder`, each whole or not there."""
    made = _names(folder, path, is_compressed)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".index", dir=folder) as scratch:
        new = _names(Path(scratch), path, is_compressed)
        options = [word for pair in zip(("--fai-idx", "--gzi-idx"), map(str, new), strict=False) for word in pair]
        with quiet_pysam() as pysam:
            try:
                pysam.faidx(str(path), *options, catch_stdout=False)
            except pysam.SamtoolsError:
                raise InputError(f"{name}: expected FASTA that can be indexed, but {_why_not(path)}.") from None
        for temporary, place in reversed(list(zip(new, made, strict=True))):  # the .fai last: where it is, all is
            os.replace(temporary, place)
    return made


def _why_not(path: Path) -> str:
    """What htslib does not say: why it could not index a file."""
    record, width, is_last = "", 0, False
    for number, line in enumerate(read_lines(path, "FASTA"), start=1):
        if line.startswith(">"):
            record, width, is_last = line[1:].partition(" ")[0], 0, False
        elif line and (is_last or (width and len(line) > width)):
            return f"the lines of record {shortened(record)} differ in length at line {number:,}; {_REWRAP}"
        else:
            is_last = bool(width) and len(line) < width
            width = width or len(line)
    return f"its last record {shortened(record)} is empty; remove it" if not width else f"it is damaged; {_REWRAP}"


# ---- whether an index is that of a file


class _Record(NamedTuple):
    """A line of a `.fai`: where a record's sequence is, in bytes of the decompressed file."""

    name: str
    length: int
    offset: int
    line_bases: int
    line_bytes: int

    @property
    def end(self) -> int:
        """Behind its last base."""
        if not self.length:
            return self.offset
        lines, rest = divmod(self.length - 1, self.line_bases)
        return self.offset + lines * self.line_bytes + rest + 1


def _compared(path: Path, name: str, fai: Path, gzi: Path | None = None) -> FastaIndex:
    """The index, if every record is in the file where it says, and nothing else is there but empty records.

    Raises:
        _MismatchError: if that is not so.
        InputError: if two records have one name, or one has none.
    """
    for index in (fai, gzi):
        if index is not None and index.stat().st_mtime_ns < path.stat().st_mtime_ns:
            raise _MismatchError(f"{index.name} is older than the file")
    lengths: dict[str, int] = {}
    with open(path, "rb") as file:
        content: _Content = _Plain(file) if gzi is None else _Bgzip(file, gzi)
        end = 0
        for record in _read_fai(fai):
            between = content.read_at(end, min(max(record.offset - end, 0), _MOST_OF_A_HEADER))
            *empty, found = _headers(between, lengths, name) or [""]
            if found != record.name or not between.endswith(b"\n"):
                raise _MismatchError(f"there is no record {shortened(record.name)} where it should be")
            if record.length and not content.read_at(record.end - 1, 1).strip():
                raise _MismatchError(f"record {shortened(found)} does not end where it should")
            lengths.update(dict.fromkeys(empty, 0))
            lengths[found] = record.length
            end = record.end
        lengths.update(dict.fromkeys(_headers(content.read_at(end, _MOST_OF_A_HEADER), lengths, name), 0))
    return FastaIndex(fai, gzi, lengths)


def _headers(text: bytes, known: dict[str, int], name: str) -> list[str]:
    """Names in the header lines of what lies between the sequences of two records."""
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith(b">"):
            words = line[1:].decode("utf-8", "replace").split()
            if not words:
                raise InputError(f"{name}: expected a name after every '>', got none.")
            if words[0] in known or words[0] in names:
                raise InputError(
                    f"{name}: two records are named {shortened(words[0])}, so that a position in it means "
                    "nothing; rename or remove one of them."
                )
            names.append(words[0])
        elif line.strip():
            where = f"behind the header of {shortened(names[-1])}" if names else "between two records"
            raise _MismatchError(f"there is sequence {where} that is not in the index")
    return names


def _read_fai(path: Path) -> Iterator[_Record]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, *numbers = line.rstrip("\n").split("\t")
            if len(numbers) != 4 or not all(number.isdecimal() and len(number) < 19 for number in numbers):
                raise _MismatchError(f"{path.name} is no index")
            record = _Record(name, *map(int, numbers))
            if record.length and not 0 < record.line_bases <= record.line_bytes:
                raise _MismatchError(f"{path.name} is no index")
            yield record


class _Content(Protocol):
    """The decompressed content of a file."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from an offset on; fewer at the end."""


class _Plain:
    def __init__(self, file: BinaryIO):
        self._file = file

    def read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


class _Bgzip:
    """Content of a bgzip file, whose `.gzi` says where its blocks are."""

    def __init__(self, file: BinaryIO, gzi: Path):
        data = gzi.read_bytes()
        count = int.from_bytes(data[:8], "little")
        if len(data) != 8 + 16 * count:
            raise _MismatchError(f"{gzi.name} is no index")
        places = struct.unpack(f"<{2 * count}Q", data[8:])
        self._compressed, self._offsets = [0, *places[::2]], [0, *places[1::2]]
        self._file = file
        self._kept: tuple[int, bytes, int] = (-1, b"", 0)  # a block's place, its content, the place of the next

    def read_at(self, offset: int, size: int) -> bytes:
        index = bisect.bisect_right(self._offsets, offset) - 1
        place, skipped = self._compressed[index], offset - self._offsets[index]
        content = b""
        while len(content) < skipped + size:
            block, place = self._block(place)
            if not block:
                break
            content += block
        return content[skipped : skipped + size]

    def _block(self, place: int) -> tuple[bytes, int]:
        """Content of the block at a place of the file, and the place of the next; empty at the end."""
        if self._kept[0] != place:
            self._file.seek(place)
            head = self._file.read(18)
            if head and not (is_bgzip(head) and len(head) == 18):
                raise _MismatchError("its blocks are not where they should be")
            size = int.from_bytes(head[16:18], "little") + 1 if head else 0
            try:
                content = zlib.decompress(head + self._file.read(size - 18), wbits=31) if head else b""
            except zlib.error:
                raise _MismatchError("its blocks are damaged or not where they should be") from None
            self._kept = (place, content, place + size)
        return self._kept[1:]
