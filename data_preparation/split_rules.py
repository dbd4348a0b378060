"""Which part of which sequence belongs to which split: a table of rules, the first that matches wins."""

import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

DROPPED = "-"  # the split of what is left out


@dataclass(frozen=True)
class SplitRule:
    """One line of the table.

    Args:
        pattern: shell pattern of `FILE:RECORD`, for example `*ENm002*:*` or `human.fa.gz:chr9*`. The file is named
            without its folder.
        start, end: bases of the record that the rule is about, 0-based and half-open; `None` means all of it.
        split: name of the split, or `-` to leave these bases out.
        keep: share of the examples to keep, in (0, 1]; drawn at random with the data set's seed.
    """

    pattern: str
    split: str
    start: int | None = None
    end: int | None = None
    keep: float = 1.0

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


EVERYTHING_TRAINS = (SplitRule("*", "train"),)


def read_split_rules(path: str | Path) -> list[SplitRule]:
    """The rules of a tab-separated table with a header: `pattern`, `split`, and optionally `start`, `end`, `keep`.

    Lines that start with `#` are comments; an empty cell or `.` means that nothing is given.

    Raises:
        ValueError: if a column is missing or unknown, or a cell cannot be read; the message names the line.
    """
    known = ("pattern", "split", "start", "end", "keep")
    header: list[str] | None = None
    rules: list[SplitRule] = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if header is None:
            header = cells
            wrong = [name for name in header if name not in known]
            if wrong or "pattern" not in header or "split" not in header:
                raise ValueError(
                    f"{path}, line {number}: expected a header of tab-separated columns pattern, split and "
                    f"optionally start, end, keep, got {line!r}."
                )
            continue
        given = {name: cell for name, cell in zip(header, cells, strict=False) if cell not in ("", ".")}
        if not {"pattern", "split"} <= set(given) or len(cells) > len(header):
            raise ValueError(f"{path}, line {number}: expected the columns {', '.join(header)}, got {line!r}.")
        try:
            rule = SplitRule(
                given["pattern"],
                given["split"],
                int(given["start"]) if "start" in given else None,
                int(given["end"]) if "end" in given else None,
                float(given.get("keep", 1.0)),
            )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from None
        if not 0 < rule.keep <= 1 or (rule.start or 0) < 0 or (rule.end is not None and rule.end <= (rule.start or 0)):
            raise ValueError(
                f"{path}, line {number}: expected 0 <= start < end and 0 < keep <= 1 (use the split {DROPPED!r} to "
                f"leave bases out), got {line!r}."
            )
        rules.append(rule)
    if not rules:
        raise ValueError(f"{path}: expected at least one rule below the header, got none.")
    return rules


def parts_of_record(rules: list[SplitRule] | tuple[SplitRule, ...], file: str, record: str, length: int) -> list[Part]:
    """Parts of a record of `length` bases, in order and without overlap; what is dropped is not among them.

    Every base belongs to the first rule that matches it.

    Raises:
        ValueError: if no rule matches some of the bases.
    """
    matching = [rule for rule in rules if rule.matches(file, record)]
    cuts = {0, length}
    for rule in matching:
        cuts.update(min(cut, length) for cut in (rule.start, rule.end) if cut is not None)
    parts: list[Part] = []
    bounds = sorted(cuts)
    for start, end in itertools.pairwise(bounds):
        for rule in matching:
            if (rule.start or 0) <= start and (rule.end is None or end <= rule.end):
                break
        else:
            raise ValueError(
                f"no rule of the split table matches {file}:{record}, bases {start} to {end}; add one, for example "
                f"'*' with the split 'train' as the last line, or with {DROPPED!r} to leave the rest out."
            )
        if rule.split == DROPPED:
            continue
        if parts and parts[-1].end == start and (parts[-1].split, parts[-1].keep) == (rule.split, rule.keep):
            parts[-1] = Part(parts[-1].start, end, rule.split, rule.keep)
        else:
            parts.append(Part(start, end, rule.split, rule.keep))
    return parts
