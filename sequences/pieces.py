"""Sequences of any length in bounded memory: pieces that follow one another."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

LONGEST_PIECE = 1 << 20  # bases


class SequencePiece(NamedTuple):
    """Some bases of one record; the pieces of a record come in order, without gaps, and at least one of them.

    Args:
        name: of the record.
        start: place of the first base in the record, from 0.
        text: the bases, at most `LONGEST_PIECE`; none only if the record has none.
        is_last: whether the record ends with it.
        description: the rest of the record's header, if its format has one; bytes that are no UTF-8 as Python escapes
            them (`surrogateescape`).
    """

    name: str
    start: int
    text: str
    is_last: bool
    description: str = ""


def pieces_of(name: str, sequence: str) -> Iterator[SequencePiece]:
    """The pieces of a sequence that is in memory."""
    starts = range(0, max(1, len(sequence)), LONGEST_PIECE)
    for start in starts:
        stop = start + LONGEST_PIECE
        yield SequencePiece(name, start, sequence[start:stop], stop >= len(sequence))


def whole_records(pieces: Iterable[SequencePiece]) -> Iterator[tuple[str, str]]:
    """Name and sequence of each record; the longest one has to fit into memory."""
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.is_last:
            yield piece.name, "".join(texts)
            texts = []
