"""Labelled sequences: where they are, how they are read, and what is in two places at once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data_preparation.leakage import KmerSketch, canonical_kmers, sketch
from ..sequences.alphabet import IUPAC, reverse_complement
from ..sequences.fasta import read_fasta
from ..support.errors import InputError, quoted, shortened
from .tables import class_name, in_order, is_missing, is_number, place, read_table, text_table

_LETTERS = "".join(IUPAC)
_MOST_KMERS = 1 << 24  # of the training rows that are kept: 128 MB
_DNA = re.compile(f"[{_LETTERS}{_LETTERS.lower()}]+")


@dataclass(frozen=True)
class LabelledSequences:
    """Sequences with one class each.

    Args:
        sequences: DNA, in upper case, T for U.
        labels: (rows,) index into `classes`.
        classes: names of the classes, sorted; of two, the second is the positive one, whose AUPRC is computed.
        groups: (rows,) what may not be torn apart by a split (the fold of each row), if there is such a thing.
    """

    sequences: list[str]
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, rows: np.ndarray) -> "LabelledSequences":
        """Some rows, by index or by mask."""
        indices = np.arange(len(self))[rows]
        groups = None if self.groups is None else self.groups[indices]
        return replace(
            self, sequences=[self.sequences[i] for i in indices], labels=self.labels[indices], groups=groups
        )

    def sample(self, most: int | None, seed: int) -> "LabelledSequences":
        """At most so many rows, drawn without replacement, in their order.

        A class keeps 20 rows, or all that it has of less; fewer where `most` would not hold twice as many of all.
        """
        if most is None or most >= len(self):
            return self
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(self), most, replace=False)
        least = min(20, most // (2 * len(self.classes)))
        drawn = self.labels[chosen]
        spare = chosen[pd.Series(drawn).groupby(drawn).cumcount() >= least]
        added = [np.empty(0, dtype=np.int64)]
        for index in range(len(self.classes)):
            others = np.setdiff1d(np.flatnonzero(self.labels == index), chosen)
            lacking = min(least - int((drawn == index).sum()), len(others))
            if lacking > 0:
                added.append(generator.choice(others, lacking, replace=False))
        rows = np.concatenate(added)
        return self.take(np.sort(np.concatenate([np.setdiff1d(chosen, spare[: len(rows)]), rows])))

    def joined(self, others: "LabelledSequences") -> "LabelledSequences":
        """These rows, and then those of others with the same classes; without groups."""
        sequences, labels = [*self.sequences, *others.sequences], np.concatenate([self.labels, others.labels])
        return replace(self, sequences=sequences, labels=labels, groups=None)

    def class_rows(self) -> dict[str, int]:
        """How many rows each class has."""
        return dict(zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))


def read_labelled(
    source: Any,
    data: Path,
    sequence_column: str = "sequence",
    label_column: str = "label",
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
) -> LabelledSequences:
    """Read one split of a labelled set.

    Args:
        source: a CSV, TSV or Parquet file (also compressed) below `data`; a mapping of a class to a FASTA file below
            `data`; or a mapping with `repo`, `split` and optionally `revision` and `name`, for a data set on the Hub.
        data: folder that paths are relative to.
        sequence_column, label_column, group_column: names of columns.
        classes: all classes, if rows of this split may lack some.
        positive: of two classes, the one that comes second.

    Raises:
        InputError: if a column is missing, there are no rows, a cell is empty, a sequence is not DNA (IUPAC codes), or
            a class is not among `classes`, or `positive` is not one of two; the message names the file and the row.
        OSError: if a file cannot be read.
    """
    where = source_name(source, data)
    columns = [sequence_column, label_column] + ([group_column] if group_column else [])
    table = _read_source(source, data, columns)
    if table.empty:
        raise InputError(f"{where}: expected rows with a sequence and a label each, got none.")
    for column in columns[1:]:
        empty = np.flatnonzero(is_missing(table[column].map(class_name)))
        if len(empty):
            more = f" (and {len(empty) - 1:,} more such rows)" if len(empty) > 1 else ""
            raise InputError(
                f"{where}, {place(table, empty[0])}: expected a value in the column {column!r}, got "
                f"{shortened(table[column].iloc[empty[0]])}{more}."
            )
    sequences = sequences_of(table, sequence_column, where)
    names = table[label_column].map(class_name)
    known = in_order(names.unique()) if classes is None else list(classes)
    if positive is not None and classes is None:
        if len(known) != 2 or class_name(positive) not in known:
            raise InputError(
                f"{where}: expected two classes, one of them {positive!r} (positive), got {quoted(known)}."
            )
        known.sort(key=class_name(positive).__eq__)
    strange = sorted(set(names) - set(known))
    if strange:
        raise InputError(
            f"{where}: expected the classes of the training rows, {quoted(known)}, got {quoted(strange)}."
        )
    return LabelledSequences(
        sequences=sequences,
        labels=names.map({name: index for index, name in enumerate(known)}).to_numpy(dtype=np.int64),
        classes=known,
        groups=table[group_column].map(class_name).to_numpy(dtype=str) if group_column else None,
    )


def sequences_of(table: pd.DataFrame, column: str, where: str) -> list[str]:
    """A column of sequences, in upper case, T for U.

    Args:
        table: of `tables.read_table`.
        column: its name.
        where: the file, for errors.

    Raises:
        InputError: if a cell is empty, or holds other letters than the IUPAC codes of DNA; the message names the row.
    """
    sequences = []
    for row, cell in enumerate(table[column]):
        text = cell.strip()
        if not text:
            raise InputError(f"{where}, {place(table, row)}: expected a sequence, got an empty cell or record.")
        if not _DNA.fullmatch(text):
            strange = sorted(set(text) - set(_LETTERS + _LETTERS.lower()))
            raise InputError(
                f"{where}, {place(table, row)}: expected DNA (the letters {_LETTERS}), got {quoted(strange, limit=5)} "
                f"in {shortened(text)}."
            )
        sequences.append(text.upper().replace("U", "T"))
    return sequences


def check_classes(rows: LabelledSequences, where: str, least: int = 2) -> None:
    """Refuse rows that no classifier can be fitted on and chosen by.

    Args:
        rows: of training.
        where: what they are, for the error.
        least: rows that every class needs: one to fit on and one to choose by.

    Raises:
        InputError: if there are fewer than two classes, or a class has too few rows.
    """
    if len(rows.classes) < 2:
        raise InputError(f"{where}: expected two classes or more, got {quoted(rows.classes)}.")
    rare = {name: count for name, count in rows.class_rows().items() if count < least}
    if rare:
        found = ", ".join(f"{count} of {shortened(name)}" for name, count in list(rare.items())[:10])
        hint = "remove these classes or join them with others"
        if len(rows.classes) > 10 and all(is_number(name) for name in rows.classes):
            hint = "if the labels are numbers to predict, use examples/fine_tuning/regress_sequences.py"
        raise InputError(
            f"{where}: expected {least} training rows or more of each class, got {found}"
            f"{f' and {len(rare) - 10} more classes' if len(rare) > 10 else ''}; {hint}."
        )


def source_name(source: Any, data: Path) -> str:
    """A source of `read_labelled` in words, for errors."""
    if isinstance(source, Mapping) and "repo" in source:
        return f"data set {source['repo']}, {source.get('split')}"
    if isinstance(source, Mapping):
        return ", ".join(str(data / str(path)) for path in source.values())
    return str(data / str(source))


def _read_source(source: Any, data: Path, columns: Sequence[str]) -> pd.DataFrame:
    if isinstance(source, Mapping) and "repo" in source:
        return _read_hub(source, columns)
    if isinstance(source, Mapping):
        return _read_classes(source, data, columns)
    return read_table(data / str(source), columns)


def _read_hub(source: Mapping[str, Any], columns: Sequence[str]) -> pd.DataFrame:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    unknown = set(source) - {"repo", "split", "revision", "name"}
    if unknown or "split" not in source:
        raise InputError(f"expected repo, split, and optionally revision and name, got {dict(source)}.")
    try:
        found = load_dataset(
            source["repo"], source.get("name"), split=source["split"], revision=source.get("revision")
        )
    except DatasetsError as error:
        raise InputError(f"{source_name(source, Path())}: {' '.join(str(error).split())}") from error
    missing = [name for name in columns if name not in found.column_names]
    if missing:
        raise InputError(
            f"{source_name(source, Path())}: expected the columns {quoted(columns)}, got {quoted(found.column_names)}."
        )
    return text_table({name: found[name] for name in columns})


def _read_classes(files: Mapping[str, str], data: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table of the records of a FASTA file per class; they have no other columns than sequence and label."""
    sequence_column, label_column, *others = columns
    if others:
        raise InputError(f"{source_name(files, data)}: FASTA files have no column {others[0]!r}.")
    records = [
        (f"{name!r} of {path}", sequence, str(label))
        for label, path in files.items()
        for name, sequence in read_fasta(data / path)
    ]
    index = pd.Index([place for place, _, _ in records], name="record", dtype=object)
    cells = [cells for _, *cells in records]
    return pd.DataFrame(cells, columns=[sequence_column, label_column], index=index, dtype=object)


@dataclass(frozen=True)
class Overlap:
    """How often a sequence, or its reverse complement, occurs more than once, whole or in part.

    Args:
        duplicates_in_train: rows of the training split that repeat an earlier one.
        conflicts_in_train: of these, rows whose label differs from those before.
        test_rows_in_train: rows of the test split that occur in the training split.
        conflicting_labels: of these, rows whose label differs there.
        is_near_train: (test rows,) which of them occur there, or share half of their 31-mers or more with the training
            rows taken together, as windows of one region do.
    """

    duplicates_in_train: int
    conflicts_in_train: int
    test_rows_in_train: int
    conflicting_labels: int
    is_near_train: np.ndarray

    def counts(self) -> dict[str, int]:
        """All of it as numbers of rows, by name."""
        counts = {name: value for name, value in vars(self).items() if name != "is_near_train"}
        return {**counts, "test_rows_near_train": int(self.is_near_train.sum())}


def overlap(train: LabelledSequences, test: LabelledSequences) -> Overlap:
    """Duplicates within the training split, and between it and the test split; either strand counts."""
    seen: dict[str, set[str]] = {}
    duplicates = train_conflicts = 0
    for text, label in zip(train.sequences, train.labels, strict=True):
        labels = seen.setdefault(of_either_strand(text), set())
        duplicates += bool(labels)
        train_conflicts += bool(labels) and train.classes[label] not in labels
        labels.add(train.classes[label])
    found = [seen.get(of_either_strand(text)) for text in test.sequences]
    shared = np.array([labels is not None for labels in found], dtype=bool)
    conflicts = sum(
        labels is not None and test.classes[label] not in labels
        for labels, label in zip(found, test.labels, strict=True)
    )
    near = shared | near_rows(train.sequences, test.sequences)
    return Overlap(duplicates, train_conflicts, int(shared.sum()), conflicts, near)


def near_rows(train: Sequence[str], test: Sequence[str]) -> np.ndarray:
    """(test rows,) bool: which share half of their 31-mers, of either strand, or more with the training rows.

    From some millions of k-mers on, both are sketches of these. What is shorter than 31 bases shares none.
    """
    outer = KmerSketch(scale=1, most=_MOST_KMERS)
    for text in train:
        outer.add(text)
        outer.end_run()
    kept = outer.kmers()
    near = np.zeros(len(test), dtype=bool)
    for row, text in enumerate(test):
        kmers = sketch(canonical_kmers(text), outer.scale)
        if len(kmers) and len(kept):
            places = np.searchsorted(kept, kmers).clip(max=len(kept) - 1)
            near[row] = (kept[places] == kmers).mean() >= 0.5
    return near


def of_either_strand(text: str) -> str:
    """A sequence, the same for its reverse complement."""
    return min(text, reverse_complement(text))
