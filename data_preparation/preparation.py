"""FASTA files to examples, one after the other, and what is noted on the way."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..sequences.fasta import stream_fasta
from ..sequences.letter_counts import FOREIGN, LetterCounts
from ..sequences.pieces import SequencePiece
from ..support.errors import InputError
from ..support.input_file import STANDARD_INPUT, shown_name
from ..support.printable import printable
from .documents import DocumentCutter, cut_documents
from .examples import ExampleStream, SplitCount
from .leakage import KmerSketch
from .split_rules import DROPPED, EVERYTHING_TRAINS, SplitRule
from .window_options import WindowOptions

_AT_ONCE = 1 << 20  # bases of a document


@dataclass
class FileReport:
    """What was read of one file."""

    name: str
    sha256: str = ""
    records: int = 0
    empty_records: int = 0
    letters: LetterCounts = field(default_factory=LetterCounts)


@dataclass
class Preparation:
    """What a data set is made of; complete when the last example has been made.

    Args:
        rules: which bases belong to which split. Those about no base at all are in `unused_rules` in the end.
        sketch_scale: if given, one in so many k-mers of each split is kept in `sketches`.
    """

    rules: Sequence[SplitRule] = EVERYTHING_TRAINS
    sketch_scale: int | None = None
    files: list[FileReport] = field(default_factory=list)
    splits: dict[str, SplitCount] = field(default_factory=dict)
    sketches: dict[str, KmerSketch] = field(default_factory=dict)
    unused_rules: list[SplitRule] = field(default_factory=list)

    def __post_init__(self):
        self.unused_rules = list(self.rules)
        self.splits = {rule.split: SplitCount() for rule in self.rules if rule.split != DROPPED}


def iterate_examples(
    fasta: Sequence[str | Path],
    options: WindowOptions,
    preparation: Preparation,
    on_bases: Callable[[int], Any] | None = None,
    folder: Path | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and example (see `genome_dataset.features`) of every example, in the order of the files.

    Args:
        fasta: files, plain or compressed; `-` is standard input. Each is read once, in bounded memory.
        options: how sequences are cut.
        preparation: has the rules, and is filled.
        on_bases: called with a number of bases as they are read, for a progress bar.
        folder: where documents lie meanwhile that are too long for memory.

    Raises:
        InputError: if a file is not FASTA or not DNA, names a record twice, or no rule matches a record.
        OSError: if a file cannot be read.
    """
    _check_that_none_repeats([path if str(path) == STANDARD_INPUT else os.path.realpath(path) for path in fasta])
    times_named = Counter(map(_short_name, fasta))
    seen: set[tuple[str, str]] = set()
    streams: dict[tuple[str, float], ExampleStream] = {}
    for path in fasta:
        report, digest = FileReport(_short_name(path)), hashlib.sha256()
        preparation.files.append(report)
        pieces = _noted(
            stream_fasta(path, digest, options.repeated_names), path, report, options, preparation.unused_rules
        )
        if on_bases is not None:
            pieces = _counted(pieces, on_bases)
        if times_named[report.name] > 1:
            pieces = _unique(pieces, report.name, seen)
        cutter = DocumentCutter(options.longest_gap, options.foreign != "keep", folder)
        for part, document in cut_documents(pieces, report.name, preparation.rules, cutter):
            stream = streams.get((part.split, part.keep))
            if stream is None:
                generator = np.random.default_rng((options.seed, len(streams)))
                stream = ExampleStream(options, part.keep, preparation.splits[part.split], generator)
                streams[part.split, part.keep] = stream
            if preparation.sketch_scale is not None:
                sketch = preparation.sketches.setdefault(part.split, KmerSketch(preparation.sketch_scale))
                for left in range(0, len(document), _AT_ONCE):
                    sketch.add(document.text(left, min(left + _AT_ONCE, len(document)), "+"))
                sketch.end_run()
            for example in stream.examples(document):
                yield part.split, example
        report.sha256 = digest.hexdigest()
        _check_foreign_share(path, report.letters, options)
    for stream in streams.values():
        stream.end()


def _short_name(path: str | Path) -> str:
    """What rules and the record call a file."""
    return "stdin" if str(path) == STANDARD_INPUT else Path(path).name


def _check_that_none_repeats(paths: Sequence[str | Path]) -> None:
    repeated = [path for path, times in Counter(map(str, paths)).items() if times > 1]
    if repeated:
        raise InputError(f"expected every file once, got {', '.join(map(shown_name, repeated[:10]))} more often.")


def _noted(
    pieces: Iterable[SequencePiece],
    path: str | Path,
    report: FileReport,
    options: WindowOptions,
    unused_rules: list[SplitRule],
) -> Iterator[SequencePiece]:
    """The pieces as they are; what they hold is noted in `report`, and rules that are used leave `unused_rules`."""
    for piece in pieces:
        if report.letters.add(piece.text) and options.foreign == "fail":
            found = FOREIGN.search(piece.text)
            assert found
            raise InputError(
                f"{shown_name(path)}: base {piece.start + found.start() + 1:,} of '{printable(piece.name)}' is "
                f"'{printable(found[0])}', which is no IUPAC code of DNA; remove it, or choose another way than "
                "foreign='fail' (--foreign) to treat such characters."
            )
        if piece.is_last:
            length = piece.start + len(piece.text)
            report.records += 1
            report.empty_records += length == 0
            for rule in [rule for rule in unused_rules if (rule.start or 0) < length]:
                if rule.matches(report.name, piece.name):
                    unused_rules.remove(rule)
        yield piece


def _counted(pieces: Iterable[SequencePiece], on_bases: Callable[[int], Any]) -> Iterator[SequencePiece]:
    """The pieces as they are; `on_bases` hears of their lengths."""
    for piece in pieces:
        on_bases(len(piece.text))
        yield piece


def _unique(pieces: Iterable[SequencePiece], file: str, seen: set[tuple[str, str]]) -> Iterator[SequencePiece]:
    """The pieces, unless rules and origins could not tell a record from one of another file of the same name."""
    for piece in pieces:
        if piece.start == 0:
            if (file, piece.name) in seen:
                raise InputError(
                    f"two files named {printable(file)} hold a record '{printable(piece.name)}'; rename one of them."
                )
            seen.add((file, piece.name))
        yield piece


def _check_foreign_share(path: str | Path, letters: LetterCounts, options: WindowOptions) -> None:
    if options.foreign == "limit" and letters.foreign_share > options.most_foreign:
        raise InputError(
            f"{shown_name(path)}: {letters.foreign_share:.2%} of its {letters.total:,} letters are not IUPAC codes of "
            f"DNA ({letters.foreign_in_words()}), at most {options.most_foreign:.2%} may be{_guess(letters.foreign)}. "
            "Clean the file, or choose with foreign= (--foreign): 'cut' ends a piece at each of them, 'keep' makes "
            "them [UNK]."
        )


def _guess(foreign: Counter[str]) -> str:
    """What such a file may be."""
    frequent = {character.upper() for character, times in foreign.items() if times * 50 >= foreign.total()}
    if len(frequent & set("EFILPQ")) >= 3:
        return "; this looks like protein"
    if frequent & set("0123456789"):
        return "; this looks like lines of GenBank with their numbers"
    if "X" in frequent:
        return "; this looks like repeats masked with X, which should be N or lower case"
    if frequent & set("-.~"):
        return "; this looks like an alignment with gaps"
    return ""
