"""Sequences of any length, read by a model in overlapping windows.

The rule, exactly. A model that reads W bases at once, with an overlap of V, reads a sequence of L bases in windows
that start at 0, S, 2S, ..., with S = W - V. All have W bases: the last one starts at L - W. A sequence of at most W
bases is one window. Each base is taken from that window in which the model sees most around it:

- reading onwards (causal models): the first window that holds the base, so that at least V bases are before it
  wherever the sequence has as many;
- reading both sides (masked models): the window whose centre is nearest, of two the first.

The reverse strand is read as the sequence that it is: its windows are those of the reverse complement, so what is
found for it is what would be found in a file of the reverse complement. Coordinates are 0-based and half-open, on the
forward strand.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..sequences.pieces import SequencePiece

STRANDS = ("+", "-")


class Window(NamedTuple):
    """What a model reads at once, and the bases that are taken from it.

    Args:
        start, end: bases that are read.
        keep_start, keep_end: bases that are taken, within them.
    """

    start: int
    end: int
    keep_start: int
    keep_end: int

    def mirrored(self, length: int) -> "Window":
        """The same window of the reverse complement of `length` bases."""
        return Window(length - self.end, length - self.start, length - self.keep_end, length - self.keep_start)

    def kept(self, strand: str = "+") -> slice:
        """Where the bases that are taken stand in what is read, in the order of reading."""
        if strand == "-":
            return slice(self.end - self.keep_end, self.end - self.keep_start)
        return slice(self.keep_start - self.start, self.keep_end - self.start)


def windows_of(
    length: int,
    context: int,
    overlap: int | None = None,
    *,
    strand: str = "+",
    both_sides: bool = False,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Window]:
    """The windows from which the bases `start` to `end` of a sequence are taken, and these bases: each once.

    A part of a sequence gets the same windows as the whole, so its values do not depend on where it was cut out.

    Args:
        length: bases of the sequence.
        context: bases that the model reads at once.
        overlap: bases that a window shares with the next one; half the context by default.
        strand: which is read; windows of `-` come in its own order, their coordinates are those of the forward strand.
        both_sides: whether the model sees what is behind a base, too.
        start, end: the bases that are wanted; all by default.

    Raises:
        ValueError: if these numbers do not fit one another.

    Example:

    >>> [tuple(window) for window in windows_of(10, 4, 2)]
    [(0, 4, 0, 4), (2, 6, 4, 6), (4, 8, 6, 8), (6, 10, 8, 10)]
    """
    overlap = checked_overlap(context, overlap)
    end = length if end is None else end
    if not 0 <= start <= end <= length:
        raise ValueError(f"expected 0 <= start <= end <= length, got {start:,}, {end:,} and {length:,}.")
    if strand not in STRANDS:
        raise ValueError(f"expected the strand + or -, got {strand!r}.")
    if strand == "-":
        for window in _windows(length, context, overlap, both_sides, length - end, length - start):
            yield window.mirrored(length)
    else:
        yield from _windows(length, context, overlap, both_sides, start, end)


def checked_overlap(context: int, overlap: int | None = None) -> int:
    """The overlap, or half the context.

    Raises:
        ValueError: if windows of the context cannot overlap by so much.
    """
    if context < 1:
        raise ValueError(f"expected a context of at least 1 base, got {context:,}.")
    if overlap is None:
        return context // 2
    if not 0 <= overlap < context:
        raise ValueError(f"expected an overlap of 0 to {context - 1:,} (less than the context), got {overlap:,}.")
    return overlap


def _windows(length: int, context: int, overlap: int, both_sides: bool, start: int, end: int) -> Iterator[Window]:
    stride, last = context - overlap, max(0, length - context)
    index = max(0, start - context) // stride  # no later than the first that is wanted
    keep_start = 0 if index == 0 else start
    while keep_start < end:
        first = min(index * stride, last)
        stop = min(first + context, length)
        if first == last:
            keep_end = length
        elif both_sides:
            keep_end = (min(first + stride, last) + stop + 1) // 2
        else:
            keep_end = stop
        if keep_end > max(start, keep_start):
            yield Window(first, stop, max(start, keep_start), min(end, keep_end))
        keep_start, index = max(keep_start, keep_end), index + 1


class Stretch(NamedTuple):
    """Some bases of a sequence, with those around them that windows need.

    Args:
        name: of the sequence.
        start, end: the bases.
        offset: place of the first letter of `text` in the sequence.
        text: the bases and what surrounds them.
        is_last: whether the sequence ends with them.
    """

    name: str
    start: int
    end: int
    offset: int
    text: str
    is_last: bool

    def read(self, start: int, end: int) -> str:
        """Letters of the sequence, which have to be in `text`."""
        return self.text[start - self.offset : end - self.offset]


def stretches(pieces: Iterable[SequencePiece], size: int, margin: int) -> Iterator[Stretch]:
    """Sequences of any length as stretches of `size` bases, in memory for one of them and a piece.

    Args:
        pieces: of sequences, one after the other.
        size: bases of a stretch; the last one of a sequence may have fewer, but none only if the sequence has none.
        margin: bases around a stretch that are kept with it, where the sequence has them; with the model's context,
            all windows that its bases are taken from lie within.
    """
    waiting, offset, start = "", 0, 0  # `waiting` holds the sequence from `offset` on; `start` is of the next stretch
    for piece in pieces:
        waiting += piece.text
        known = offset + len(waiting)
        while start + size + margin < known or piece.is_last:
            end = min(start + size, known)
            is_last = piece.is_last and end == known
            text = waiting[: min(end + margin, known) - offset]
            yield Stretch(piece.name, start, end, offset, text, is_last)
            if is_last:
                waiting, offset, start = "", 0, 0
                break
            start = end
            keep_from = max(0, start - margin)
            waiting, offset = waiting[keep_from - offset :], keep_from
