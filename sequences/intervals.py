"""Regions of sequences: BED files, and texts such as `chr1:1,000-2,000`.

BED counts bases from 0 and leaves the end out, as this package does everywhere. A region in one text is read as
samtools reads it: from 1, with its end.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..support.errors import InputError, quoted, shortened
from ..support.input_file import shown_name
from .text_lines import read_lines, whole_number

_POSITION = "[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
_RANGE = re.compile(f"({_POSITION})?-({_POSITION})?")


@dataclass(frozen=True)
class Interval:
    """Bases `start` to `end` of a record, 0-based and half-open, on the forward strand.

    Args:
        record: name of the sequence.
        start, end: with 0 <= start < end.
        name: what the region is called; empty if it has no name.
        strand: in which it is read: `+`, `-`, or `.` if that is not said.
    """

    record: str
    start: int
    end: int
    name: str = ""
    strand: str = "."

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        """As samtools writes it, from 1 and with its end."""
        return f"{self.record}:{self.start + 1}-{self.end}"

    @property
    def place(self) -> str:
        """The same for readers: `chr1:1,001-2,000`."""
        return f"{self.record}:{self.start + 1:,}-{self.end:,}"


def read_bed(path: str | Path, lengths: Mapping[str, int] | None = None) -> Iterator[Interval]:
    """The regions of a BED file of three or more columns, in its order.

    Columns are separated by tabs or, in lines without any, by blanks. Name (column 4) and strand (column 6) are kept.
    Blank lines, comments (`#`) and lines that begin with `track` or `browser` are left out.

    Args:
        path: the file, plain or compressed; `-` is standard input.
        lengths: bases of each record, to check regions against.

    Raises:
        InputError: if a line has too few columns or as many as no line before it, a region has no bases, or does not
            lie in its record; the message names the line.
        OSError: if the file cannot be read.
    """
    source = shown_name(path)
    columns, number_of_first = 0, 0
    for number, line in enumerate(read_lines(path, "BED"), start=1):
        if not line.strip() or line.startswith("#") or line.split(None, 1)[0] in ("track", "browser"):
            continue
        here = f"{source}, line {number}"
        if not columns and line.startswith((">", "@")):
            raise InputError(
                f"{here}: expected regions (BED), got sequences; give these without a genome beside them."
            )
        cells = line.split("\t") if "\t" in line else line.split()
        if not columns:
            columns, number_of_first = len(cells), number
        if len(cells) < 3 or len(cells) != columns:
            expected = f"{columns} columns, as in line {number_of_first}" if len(cells) >= 3 else "at least 3 columns"
            raise InputError(f"{here}: expected {expected}, separated by tabs (BED), got {len(cells)}.")
        interval = _interval(cells, here, is_first=number == number_of_first)
        yield interval if lengths is None else _within(interval, lengths, here)
    if not columns:
        raise InputError(f"{source}: expected at least one BED line, got none.")


def parse_region(text: str, lengths: Mapping[str, int]) -> Interval:
    """A region such as `chr1:1,000-2,000`, `chr1:1000-` (to the end), `chr1:-2000` or `chr1` (all of it).

    Positions count from 1 and the end belongs to the region, as samtools has it. A single position is refused: it is
    one base to some programs, and all from there on to samtools. A name that ends like a region is put in braces where
    that is ambiguous: `{HLA:1-2}:3-4`.

    Args:
        text: the region.
        lengths: bases of each record; names may hold colons.

    Raises:
        InputError: if it names no record, or bases that the record does not have.
    """
    here = f"region {shortened(text)}"
    name, separator, bounds = text.rpartition(":")
    if text.startswith("{") and "}" in text:
        name, bounds = text[1:].split("}", 1)
        separator, bounds = bounds[:1], bounds[1:]
    elif text in lengths:
        if name in lengths and _RANGE.fullmatch(bounds):
            raise InputError(f"{here}: expected one record, got two: write {{{name}}}:{bounds} or {{{text}}}.")
        name, separator = text, ""
    elif not separator:
        name = text
    length = _length(name, lengths, here)
    if not separator:
        return _within(Interval(name, 0, length), lengths, here)
    found = _RANGE.fullmatch(bounds)
    if separator != ":" or found is None or bounds == "-":
        raise InputError(
            f"{here}: expected RECORD:START-END, counted from 1 (START- is to the end, POSITION-POSITION one base)."
        )
    start, end = _position(found[1], 1, here), _position(found[2], length, here)
    if not 1 <= start <= end:
        raise InputError(f"{here}: expected 1 <= start <= end, got {start:,} and {end:,} (positions count from 1).")
    return _within(Interval(name, start - 1, end), lengths, here)


def _interval(cells: list[str], here: str, is_first: bool) -> Interval:
    start, end = whole_number(cells[1]), whole_number(cells[2])
    if start is None or end is None or not start < end:
        hint = "; if this is a header, let it start with '#'" if is_first and start is None and end is None else ""
        raise InputError(
            f"{here}: expected 0 <= start < end (BED counts from 0 and leaves the end out), got "
            f"{shortened(cells[1])} and {shortened(cells[2])}{hint}."
        )
    strand = cells[5] if len(cells) > 5 else "."
    if strand not in ("+", "-", "."):
        raise InputError(f"{here}: expected the strand +, - or . in column 6, got {shortened(strand)}.")
    names = [cells[0], cells[3] if len(cells) > 3 else ""]
    for name in names:
        if not name.isprintable() or name != name.strip():
            raise InputError(f"{here}: expected a name that can be shown and has no blanks around it, got {name!r}.")
    if not names[0]:
        raise InputError(f"{here}: expected a record's name in column 1, got none.")
    return Interval(names[0], start, end, "" if names[1] == "." else names[1], strand)


def _length(record: str, lengths: Mapping[str, int], here: str) -> int:
    if record in lengths:
        return lengths[record]
    other = record.removeprefix("chr") if record.startswith("chr") else f"chr{record}"
    if other in lengths:
        raise InputError(f"{here}: no record {shortened(record)}, but there is {other!r}; are these of one assembly?")
    raise InputError(
        f"{here}: no record {quoted([record], list(lengths))}; the genome has {quoted(list(lengths), limit=3)}."
    )


def _within(interval: Interval, lengths: Mapping[str, int], here: str) -> Interval:
    """The interval, if it lies in its record."""
    length = _length(interval.record, lengths, here)
    if not interval.start < interval.end <= length:
        raise InputError(
            f"{here}: its end is {interval.end:,}, but {shortened(interval.record)} has {length:,} bases; are these "
            "of one assembly?"
        )
    return interval


def _position(digits: str | None, absent: int, here: str) -> int:
    if digits is None:
        return absent
    number = whole_number(digits.replace(",", ""))
    if number is None:
        raise InputError(f"{here}: expected positions of at most 18 digits, got {shortened(digits)}.")
    return number
