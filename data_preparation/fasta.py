"""Reads FASTA files, plain or gzip-compressed."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast


def read_fasta(path: str | Path) -> Iterator[tuple[str, str]]:
    """Name (the first word of the header) and sequence of each record, in the order of the file; case is kept.

    Raises:
        ValueError: if the file is not FASTA text, or a record has no name.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as raw:
        is_compressed = raw.read(2) == b"\x1f\x8b"
    name: str | None = None
    lines: list[str] = []
    with cast(IO[str], gzip.open(path, "rt") if is_compressed else open(path)) as file:
        for number, line in enumerate(_decoded(file, path), start=1):
            line = line.strip()
            if line.startswith(">"):
                if name is not None:
                    yield name, "".join(lines)
                words = line[1:].split()
                if not words:
                    raise ValueError(f"{path}, line {number}: expected a name after '>', got none")
                name, lines = words[0], []
            elif line and name is None:
                raise ValueError(f"{path}, line {number}: expected FASTA ('>' and a name), got {line[:40]!r}")
            else:
                lines.append(line)
    if name is None:
        raise ValueError(f"{path}: expected at least one FASTA record, got none")
    yield name, "".join(lines)


def _decoded(file: IO[str], path: str | Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected FASTA text, got bytes that are not text") from None
