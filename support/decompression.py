"""Decompresses gzip (also bgzip), bzip2 and xz block by block, and accepts nothing that is damaged.

The standard library's file objects ignore what follows a bzip2 or xz stream, and no gzip reader but htslib notices a
bgzip file that was cut off between two of its blocks.
"""

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError

OUTPUT_BLOCK = 1 << 20  # bytes that are decompressed at once, whatever the input claims

_GZIP_HEAD = 18  # with the field in which bgzip notes a block's size (SAM specification, section 4.1)
_END_OF_BGZIP = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")  # section 4.1.2
_AGAIN = "copy or download the file again"


class Compression(NamedTuple):
    """A kind of compressed file: its name, how it starts, and what decompresses one stream of it."""

    name: str
    start: bytes
    new_stream: Callable[[], Any]


class _GzipStream:
    """One gzip member, with the interface of `bz2.BZ2Decompressor`; zlib checks its CRC and its length."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)
        self._may_hold_more = False

    def decompress(self, data: bytes, most: int) -> bytes:
        output = self._zlib.decompress(self._zlib.unconsumed_tail + data, most)
        self._may_hold_more = len(output) == most
        return output

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._may_hold_more

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


_COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", _GzipStream),
    Compression("bzip2", b"BZh", bz2.BZ2Decompressor),
    Compression("xz", b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)),
)


def compression_of(first_bytes: bytes) -> Compression | None:
    """How a file that starts like this is compressed; None if in no way that is read here."""
    return next((kind for kind in _COMPRESSIONS if first_bytes.startswith(kind.start)), None)


def decompressed(blocks: Iterator[bytes], compression: Compression, name: str) -> Iterator[bytes]:
    """What the compressed `blocks` of a file hold, in blocks of at most `OUTPUT_BLOCK` bytes.

    Any number of streams may follow one another, then zeros, as tapes have them.

    Args:
        blocks: the file, of any block size.
        compression: its kind.
        name: what errors call it.

    Raises:
        InputError: if it is damaged, ends early, or something else follows.
    """
    is_bgzip = is_empty = False
    data = next(blocks, b"")
    while data:
        while len(data) < _GZIP_HEAD and (more := next(blocks, b"")):
            data += more
        if not data.startswith(compression.start):
            _refuse_unless_zeros(data, blocks, compression, name)
            return
        is_bgzip = compression.name == "gzip" and len(data) >= _GZIP_HEAD and data[3] & 4 != 0 and data[12:14] == b"BC"
        stream, is_empty = compression.new_stream(), True
        while not stream.eof:
            if not data and stream.needs_input:
                data = next(blocks, b"")
                if not data:
                    raise InputError(f"{name}: its {compression.name} data ends in the middle; {_AGAIN}.")
            try:
                output = stream.decompress(data, OUTPUT_BLOCK)
            except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise InputError(f"{name}: its {compression.name} data is damaged ({error}); {_AGAIN}.") from None
            data = b""
            if output:
                is_empty = False
                yield output
        data = stream.unused_data or next(blocks, b"")
    if is_bgzip and not is_empty:
        raise _cut_bgzip(name)


def refuse_cut_bgzip(path: str | Path, name: str) -> None:
    """Refuse a bgzip file without the empty block that ends it; for readers of parts, which do not come to its end.

    Args:
        path: a file that can be read at any place, of any kind.
        name: what errors call it.

    Raises:
        InputError: if it is bgzip and its end is missing.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        if is_bgzip(file.read(_GZIP_HEAD)):
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END_OF_BGZIP)))
            if file.read() != _END_OF_BGZIP:
                raise _cut_bgzip(name)


def is_bgzip(start: bytes) -> bool:
    """Whether a file that starts like this is bgzip: gzip in blocks that say how long they are."""
    return start[:4] == b"\x1f\x8b\x08\x04" and start[12:14] == b"BC"


def _cut_bgzip(name: str) -> InputError:
    return InputError(
        f"{name}: its last bgzip block is missing, so that its end may have been cut off; {_AGAIN}, or, if it is "
        "complete, write it again with `bgzip`."
    )


def _refuse_unless_zeros(data: bytes, blocks: Iterator[bytes], compression: Compression, name: str) -> None:
    while not data.strip(b"\0"):
        data = next(blocks, b"")
        if not data:
            return
    raise InputError(
        f"{name}: something that is not {compression.name} follows its {compression.name} data; {_AGAIN}, or cut it "
        "off."
    )
