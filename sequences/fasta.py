"""Reads FASTA files, plain or gzip-compressed."""

from collections.abc import Iterator
from pathlib import Path

from .text_lines import read_lines


def read_fasta(path: str | Path) -> Iterator[tuple[str, str]]:
    """Name (the first word of the header) and sequence of each record, in the order of the file; case is kept.

    Raises:
        ValueError: if the file is not FASTA text, or a record has no name.
        OSError: if it cannot be read.
    """
    name: str | None = None
    lines: list[str] = []
    for number, line in enumerate(read_lines(path, "FASTA"), start=1):
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
