"""Which part of which sequence belongs to which split: a table of rules, the first that matches wins."""

import functools
import heapq
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..sequences.text_lines import read_lines, whole_number
from ..support.errors import InputError, shortened
from ..support.input_file import shown_name
from ..support.printable import is_file_name, printable

DROPPED = "-"  # the split of what is left out
NO_RULE = ""  # the split of what no rule is about
ENDLESS = sys.maxsize  # the end of a record whose length is not known


@dataclass(frozen=True)
class SplitRule:
    """One line of the table.

    Args:
        pattern: shell pattern of `FILE:RECORD`, for example `*ENm002*:*` or `human.fa.gz:chr9*`. The file is named
            without its folder.
        start, end: bases of the record that the rule is about, 0-based and half-open; `None` means all of it.
        split: name of the split, which also names its files: ASCII letters, digits, `_` and dots inside. `-` leaves
            these bases out.
        keep: share of the examples to keep, in (0, 1]; drawn at random with the data set's seed.

    Raises:
        InputError: if the split cannot have this name, or the numbers are out of range.
    """

    pattern: str
    split: str
    start: int | None = None
    end: int | None = None
    keep: float = 1.0

    def __post_init__(self):
        if self.split != DROPPED and (not is_file_name(self.split) or "-" in self.split or self.split == "all"):
            raise InputError(
                "expected a split's name of letters, digits, '_' and dots inside, at most 100 and not 'all', got "
                f"'{printable(self.split)}'"
            )
        if not 0 < self.keep <= 1 or (self.start or 0) < 0 or (self.end is not None and self.end <= (self.start or 0)):
            raise InputError(
                f"expected 0 <= start < end and 0 < keep <= 1 (use the split {DROPPED!r} to leave bases out), got "
                f"{self.start}, {self.end} and {self.keep}"
            )

    def matches(self, file: str, record: str) -> bool:
        """Whether the rule is about a record of a file."""
        return fnmatchcase(f"{file}:{record}", self.pattern)


@dataclass(frozen=True)
class Part:
    """Bases `start` to `end` (0-based, half-open) of one record, all of one split."""

    start: int
    end: int
    split: str
    keep: float = 1.0


_COLUMNS = ("pattern", "split", "start", "end", "keep")
EVERYTHING_TRAINS = (SplitRule("*", "train"),)


def read_split_rules(path: str | Path) -> list[SplitRule]:
    """The rules of a tab-separated table with a header: `pattern`, `split`, and optionally `start`, `end`, `keep`.

    Lines that start with `#` are comments; an empty cell or `.` means that nothing is given.

    Raises:
        InputError: if a column is missing or unknown, or a cell cannot be read; the message names the line.
        OSError: if the file cannot be read.
    """
    source = shown_name(path)
    header: list[str] | None = None
    rules: list[SplitRule] = []
    for number, line in enumerate(read_lines(path, "split table"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        try:
            if header is None:
                header = _checked_header(cells)
            else:
                rules.append(_rule(header, cells))
        except InputError as error:
            raise InputError(f"{source}, line {number}: {error}.") from None
    if not rules:
        raise InputError(f"{source}: expected at least one rule below the header, got none.")
    return rules


def _checked_header(cells: list[str]) -> list[str]:
    if not {"pattern", "split"} <= set(cells) <= set(_COLUMNS) or len(set(cells)) < len(cells):
        raise InputError(
            "expected a header of tab-separated columns pattern, split and optionally start, end, keep, each once, "
            f"got {shortened(cells)}"
        )
    return cells


def _rule(header: list[str], cells: list[str]) -> SplitRule:
    given = {name: cell for name, cell in zip(header, cells, strict=False) if cell not in ("", ".")}
    if not {"pattern", "split"} <= set(given) or len(cells) > len(header):
        raise InputError(f"expected the columns {', '.join(header)}, got {shortened(cells)}")
    places = {name: whole_number(given[name]) for name in ("start", "end") if name in given}
    if None in places.values():
        raise InputError(f"expected start and end as whole numbers, got {shortened(cells)}")
    keep = given.get("keep", "1")
    if not re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]{1,3})?", keep, re.IGNORECASE | re.ASCII):
        raise InputError(f"expected keep as a number, got {shortened(keep)}")
    return SplitRule(given["pattern"], given["split"], places.get("start"), places.get("end"), float(keep))


def cut_record(rules: Sequence[SplitRule], file: str, record: str) -> list[Part]:
    """Parts of a record of any length, from 0 to `ENDLESS`, in order and without gaps.

    Every base belongs to the first rule that matches it. What is left out, and what no rule matches, are parts too, of
    the splits `DROPPED` and `NO_RULE`.
    """
    return _cut(tuple(rule for rule in rules if rule.matches(file, record)))


@functools.lru_cache(maxsize=1024)
def _cut(rules: tuple[SplitRule, ...]) -> list[Part]:
    """The parts that rules make of a record that all of them match."""
    matching = [(rule.start or 0, order, rule) for order, rule in enumerate(rules)]
    matching.sort(key=lambda entry: entry[:2], reverse=True)
    bounds = {0, ENDLESS}
    for start, _, rule in matching:
        bounds |= {start, ENDLESS if rule.end is None else rule.end}
    active: list[tuple[int, SplitRule]] = []
    parts: list[Part] = []
    for start, end in itertools.pairwise(sorted(bounds)):
        while matching and matching[-1][0] <= start:
            heapq.heappush(active, matching.pop()[1:])
        while active and active[0][1].end is not None and active[0][1].end <= start:
            heapq.heappop(active)
        split, keep = (active[0][1].split, active[0][1].keep) if active else (NO_RULE, 1.0)
        if parts and (parts[-1].split, parts[-1].keep) == (split, keep):
            start = parts.pop().start
        parts.append(Part(start, end, split, keep))
    return parts


def parts_of_record(rules: Sequence[SplitRule], file: str, record: str, length: int) -> list[Part]:
    """Parts of a record of `length` bases, in order and without overlap; what is dropped is not among them.

    Raises:
        InputError: if no rule matches some of the bases.
    """
    parts = []
    for part in cut_record(rules, file, record):
        if part.start >= length:
            break
        if part.split == NO_RULE:
            raise no_rule_error(file, record, part.start, min(part.end, length))
        if part.split != DROPPED:
            parts.append(Part(part.start, min(part.end, length), part.split, part.keep))
    return parts


def no_rule_error(file: str, record: str, start: int, end: int) -> InputError:
    """What to say of bases that the table forgets."""
    return InputError(
        f"no rule of the split table matches {printable(file)}:{printable(record)}, bases {start} to {end}; add one, "
        f"for example '*' with the split 'train' as the last line, or with {DROPPED!r} to leave the rest out."
    )
