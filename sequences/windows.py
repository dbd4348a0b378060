"""Cuts sequences into the pieces that a model reads; coordinates are 0-based and half-open, on the forward strand."""

import re
from collections.abc import Iterator


def runs_between_gaps(sequence: str, longest_gap: int) -> Iterator[tuple[int, int]]:
    """Start and end of each piece of `sequence` that has no run of more than `longest_gap` N in it.

    Shorter runs of N stay inside a piece; N at the ends of a piece are cut off.
    """
    start = 0
    for gap in re.finditer(f"[Nn]{{{longest_gap + 1},}}", sequence):
        yield from _without_outer_gaps(sequence, start, gap.start())
        start = gap.end()
    yield from _without_outer_gaps(sequence, start, len(sequence))


def _without_outer_gaps(sequence: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and sequence[start] in "Nn":
        start += 1
    while end > start and sequence[end - 1] in "Nn":
        end -= 1
    if start < end:
        yield start, end


def window_bounds(start: int, end: int, length: int, stride: int, shortest: int) -> Iterator[tuple[int, int]]:
    """Windows of `length` bases at every `stride` from `start`; the last may be shorter, but not below `shortest`."""
    for left in range(start, end, stride):
        right = min(left + length, end)
        if right - left >= min(shortest, length):
            yield left, right
        if right == end:
            return
