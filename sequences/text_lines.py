"""Lines of text files, plain or compressed."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast


def read_lines(path: str | Path, kind: str) -> Iterator[str]:
    """Lines of a file, plain, gzip or bgzip, with their ends.

    Args:
        path: the file.
        kind: what it should be, for the error: `FASTA`.

    Raises:
        ValueError: if the file is not text.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as raw:
        is_compressed = raw.read(2) == b"\x1f\x8b"
    with cast(IO[str], gzip.open(path, "rt") if is_compressed else open(path)) as file:
        try:
            yield from file
        except UnicodeDecodeError:
            raise ValueError(f"{path}: expected {kind} text, got bytes that are not text") from None
