"""Opens what a user names, once: a file, a pipe or standard input, plain or compressed."""

import codecs
import contextlib
import io
import itertools
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .decompression import compression_of, decompressed
from .errors import InputError, plain_words, size_text
from .lfs_pointer import POINTER_BYTES, refuse_lfs_pointer
from .printable import printable

STANDARD_INPUT = "-"
WAIT_FOR_A_WRITER = 5.0  # seconds, for a named pipe

_BLOCK = 1 << 16
# How files start that are often given in place of text, what they are, and what to do about it.
_NOT_TEXT = (
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it first: `zstd -d FILE`"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it first: `lz4 -d FILE`"),
    (b"\x1f\x9d", "compressed by compress", "decompress it first: `gzip -d FILE`"),
    (b"PK\x03\x04", "a zip archive", "unpack it first: `unzip FILE`"),
    (b"PK\x05\x06", "a zip archive without files", "look where it is from"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: `7z x FILE`"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it first: `unrar x FILE`"),
    (b"\x1f\x8b", "compressed twice", "decompress it once: `gzip -d FILE`"),
    (b"BZh", "compressed twice", "decompress it once: `bzip2 -d FILE`"),
    (b"\xfd7zXZ\x00", "compressed twice", "decompress it once: `xz -d FILE`"),
    (b"BAM\x01", "BAM", "write what you need of it as text with `samtools`"),
    (b"BCF\x02", "BCF", "write it as VCF: `bcftools view FILE`"),
    (b"CRAM", "CRAM", "write what you need of it as text with `samtools`"),
    (b"PAR1", "Parquet", "give it where Parquet is read, with a name that ends in .parquet"),
    (b"\x89HDF\r\n\x1a\n", "HDF5", "write what you need of it as text"),
    (b"\x1a\x41\x27\x43", "2bit", "write it as FASTA: `twoBitToFa FILE OUTPUT`"),
    (b"\x43\x27\x41\x1a", "2bit", "write it as FASTA: `twoBitToFa FILE OUTPUT`"),
    (b"%PDF", "a PDF", "look where it is from"),
    (b"\x7fELF", "a program", "look where it is from"),
    (codecs.BOM_UTF16_LE, "text in UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "text in UTF-16", "save it as UTF-8"),
)


def open_input(path: str | Path, kind: str, digest: Any = None) -> io.BufferedReader:
    """The bytes of a text file as a stream, decompressed (gzip, bgzip, bzip2, xz) and without a byte-order mark.

    The file is opened once and read from start to end, so pipes, `<(command)` and, by the name `-`, standard input
    work as well. Memory is bounded whatever the file is. Reading may raise too.

    Args:
        path: what to open.
        kind: what it should be, for errors: `FASTA`.
        digest: a hash of `hashlib` that is updated with the file's bytes as they are on the disk; it is that of the
            whole file once the stream has ended.

    Raises:
        InputError: if it is a folder, empty, a Git LFS pointer, damaged, or no text; the message names it and says
            what to do.
        OSError: if the system refuses; likewise.
    """
    name = shown_name(path)
    try:
        file, start = _opened(path, name, kind)
    except OSError as error:
        raise type(error)(plain_words(error)) from None
    try:
        return _Stream(_text_blocks(_file_blocks(file, start, name, digest), name, kind), file)
    except BaseException:
        file.close()
        raise


def read_text(path: str | Path, kind: str, most: int = 1 << 24) -> str:
    """The whole text of a small file, opened by `open_input`, as UTF-8 with line ends as they are.

    Raises:
        InputError, OSError: as `open_input`; and if it has more than `most` bytes.
    """
    with open_input(path, kind) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{shown_name(path)}: expected a {kind} file of at most {size_text(most)}, it is larger.")
    return as_text(content, shown_name(path), kind)


def as_text(content: bytes, name: str, kind: str) -> str:
    """Bytes as UTF-8.

    Raises:
        InputError: if they are not, or hold a NUL; `name` stands in front.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: expected {kind} as UTF-8 text, got the byte 0x{content[error.start]:02x}; if it is text, save "
            "it as UTF-8."
        ) from None
    if "\0" in text:
        raise InputError(f"{name}: expected {kind} text, got bytes that are not text (NUL).")
    return text


def shown_name(path: str | Path) -> str:
    """What a file is called in messages."""
    return "standard input" if str(path) == STANDARD_INPUT else printable(path)


def is_read_once(path: str | Path) -> bool:
    """Whether what `path` names cannot be read a second time: standard input, a pipe, a device."""
    if str(path) == STANDARD_INPUT:
        return True
    with contextlib.suppress(OSError):
        return not stat.S_ISREG(os.stat(path).st_mode)
    return False


class _Stream(io.BufferedReader):
    """A stream of the bytes of an iterator; closing it closes `file`."""

    def __init__(self, blocks: Iterator[bytes], file: BinaryIO):
        super().__init__(_Blocks(blocks, file), buffer_size=1 << 17)


class _Blocks(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes], file: BinaryIO):
        self._blocks, self._file, self._left = blocks, file, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: str | Path, name: str, kind: str) -> tuple[BinaryIO, bytes]:
    """The file, and what had to be read of it to open it."""
    if str(path) == STANDARD_INPUT:
        if os.isatty(0):
            raise InputError(f"standard input is a terminal; pipe {kind} into this command, or name a file.")
        return os.fdopen(os.dup(0), "rb", buffering=0), b""
    if "\0" in str(path):
        raise InputError(f"{name}: a file's name cannot hold NUL.")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder, expected a {kind} file.")
    if stat.S_ISFIFO(mode):
        return _opened_pipe(path, name)
    return open(path, "rb", buffering=0), b""


def _opened_pipe(path: str | Path, name: str) -> tuple[BinaryIO, bytes]:
    """A pipe and the first bytes in it; to open it in the ordinary way would wait for a writer without end."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    end = time.monotonic() + WAIT_FOR_A_WRITER
    while (start := file.read(_BLOCK)) == b"":  # nobody has it open for writing; None: somebody has, but is not ready
        if time.monotonic() > end:
            file.close()
            raise InputError(f"{name} is a pipe that holds nothing and nobody writes into; start what should write.")
        time.sleep(0.02)
    os.set_blocking(file.fileno(), True)
    return file, start or b""


def _file_blocks(file: BinaryIO, start: bytes, name: str, digest: Any) -> Iterator[bytes]:
    """The bytes of the file as they are on the disk."""
    block = start
    while True:
        if block:
            if digest is not None:
                digest.update(block)
            yield block
        try:
            block = file.read(_BLOCK)
        except OSError as error:
            raise type(error)(f"{name}: {plain_words(error)}") from None
        if not block:
            return


def _text_blocks(blocks: Iterator[bytes], name: str, kind: str) -> Iterator[bytes]:
    """The bytes of the text; what is wrong at its start is raised here, the rest when it is read."""
    start = _start_of(blocks)
    if not start:
        raise InputError(f"{name} is empty, expected a {kind} file.")
    refuse_lfs_pointer(start, name, InputError)
    compression = compression_of(start)
    blocks = itertools.chain([start], blocks)
    if compression is not None:
        blocks = decompressed(blocks, compression, name)
        start = _start_of(blocks)
        if not start:
            raise InputError(f"{name} holds nothing when it is decompressed, expected a {kind} file.")
        blocks = itertools.chain([start], blocks)
    _refuse_what_is_no_text(start, name, kind)
    if start.startswith(codecs.BOM_UTF8):
        return itertools.chain([start[len(codecs.BOM_UTF8) :]], itertools.islice(blocks, 1, None))
    return blocks


def _start_of(blocks: Iterator[bytes]) -> bytes:
    """The first blocks, joined, until they hold what is needed to know a file by its start, or all there is."""
    start = b""
    while len(start) < POINTER_BYTES and (block := next(blocks, b"")):
        start += block
    return start


def _refuse_what_is_no_text(start: bytes, name: str, kind: str) -> None:
    what, remedy = next(((what, remedy) for magic, what, remedy in _NOT_TEXT if start.startswith(magic)), ("", ""))
    if start[257:262] == b"ustar":
        what, remedy = "a tar archive", "unpack it first: `tar -xf FILE`"
    elif start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        what, remedy = "a web page", "download the file itself"
    elif not what and b"\0" in start:
        what, remedy = "bytes that are not text (NUL)", "look where it is from"
    if what:
        raise InputError(f"{name}: expected {kind} as text, got {what}; {remedy.replace('FILE', name)}.")
