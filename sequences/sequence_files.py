"""Reads files of sequences, FASTA or FASTQ, whichever it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support.input_file import open_input, shown_name
from .fasta import fasta_pieces
from .fastq import fastq_pieces
from .pieces import SequencePiece, whole_records


def stream_sequences(path: str | Path, digest: Any = None, repeated_names: str = "fail") -> Iterator[SequencePiece]:
    """The records of a FASTA or FASTQ file as pieces of at most 1 Mi bases: see `stream_fasta` and `stream_fastq`."""
    with open_input(path, "FASTA or FASTQ", digest) as file:
        if file.peek(1)[:1] == b"@":
            yield from fastq_pieces(file, shown_name(path))
        else:
            yield from fasta_pieces(file, shown_name(path), repeated_names)


def read_sequences(path: str | Path, repeated_names: str = "fail") -> Iterator[tuple[str, str]]:
    """Name and sequence of each record; otherwise as `stream_sequences`."""
    return whole_records(stream_sequences(path, repeated_names=repeated_names))
