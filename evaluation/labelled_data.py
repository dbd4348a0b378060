"""Labelled sequences: where they are, how they are read, and what is in two places at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..sequences.alphabet import reverse_complement
from ..sequences.fasta import read_fasta


@dataclass(frozen=True)
class LabelledSequences:
    """Sequences with one class each.

    Args:
        sequences: DNA, in upper case.
        labels: (rows,) index into `classes`.
        classes: names of the classes, sorted.
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
        """At most so many rows, drawn without replacement, in their order."""
        if most is None or most >= len(self):
            return self
        chosen = np.random.default_rng(seed).choice(len(self), most, replace=False)
        return self.take(np.sort(chosen))


def read_labelled(
    source: Any,
    data: Path,
    sequence_column: str = "sequence",
    label_column: str = "label",
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledSequences:
    """Read one split of a labelled set.

    Args:
        source: a CSV, TSV or Parquet file (also compressed) below `data`; a mapping of a class to a FASTA file below
            `data`; or a mapping with `repo`, `split` and optionally `revision` and `name`, for a data set on the Hub.
        data: folder that paths are relative to.
        sequence_column, label_column, group_column: names of columns.
        classes: all classes, if rows of this split may lack some.

    Raises:
        ValueError: if columns are missing, rows are empty, or a class is not among `classes`.
        OSError: if a file cannot be read.
    """
    table = _read_source(source, data, sequence_column, label_column)
    wanted = [sequence_column, label_column] + ([group_column] if group_column else [])
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise ValueError(f"{source}: expected the columns {wanted}, got {list(table.columns)}.")
    if table.empty or table[wanted].isna().any(axis=None):
        raise ValueError(f"{source}: expected rows with a sequence and a label each, got empty cells or no rows.")
    names = table[label_column].astype(str)
    known = sorted(names.unique()) if classes is None else list(classes)
    strange = sorted(set(names) - set(known))
    if strange:
        raise ValueError(f"{source}: expected the classes {known}, got also {strange[:10]}.")
    return LabelledSequences(
        sequences=[str(text).strip().upper() for text in table[sequence_column]],
        labels=names.map({name: index for index, name in enumerate(known)}).to_numpy(dtype=np.int64),
        classes=known,
        groups=table[group_column].to_numpy() if group_column else None,
    )


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """A Parquet, TSV (`.tsv`, `.txt`) or CSV file, also compressed; only empty cells are missing values.

    Args:
        path: the file.
        options: of `pandas.read_csv`, for the latter two.
    """
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    is_tabular = ".tsv" in path.suffixes or ".txt" in path.suffixes
    return pd.read_csv(path, sep="\t" if is_tabular else ",", keep_default_na=False, na_values=[""], **options)


def _read_source(source: Any, data: Path, sequence_column: str, label_column: str) -> pd.DataFrame:
    if isinstance(source, Mapping) and "repo" in source:
        from datasets import load_dataset

        unknown = set(source) - {"repo", "split", "revision", "name"}
        if unknown or "split" not in source:
            raise ValueError(f"expected repo, split, and optionally revision and name, got {dict(source)}.")
        found = load_dataset(
            source["repo"], source.get("name"), split=source["split"], revision=source.get("revision")
        )
        return found.to_pandas()
    if isinstance(source, Mapping):
        rows = [
            {sequence_column: sequence, label_column: str(label)}
            for label, path in source.items()
            for _, sequence in read_fasta(data / path)
        ]
        return pd.DataFrame(rows, columns=[sequence_column, label_column])
    return read_table(data / str(source))


@dataclass(frozen=True)
class Overlap:
    """How often a sequence, or its reverse complement, occurs more than once.

    Args:
        duplicates_in_train: rows of the training split that repeat an earlier one.
        test_rows_in_train: rows of the test split that occur in the training split.
        conflicting_labels: of these, rows whose label differs there.
    """

    duplicates_in_train: int
    test_rows_in_train: int
    conflicting_labels: int


def overlap(train: LabelledSequences, test: LabelledSequences) -> Overlap:
    """Duplicates within the training split, and between it and the test split; either strand counts."""
    seen: dict[str, set[str]] = {}
    duplicates = 0
    for text, label in zip(train.sequences, train.labels, strict=True):
        key = min(text, reverse_complement(text))
        duplicates += key in seen
        seen.setdefault(key, set()).add(train.classes[label])
    shared = conflicts = 0
    for text, label in zip(test.sequences, test.labels, strict=True):
        labels = seen.get(min(text, reverse_complement(text)))
        if labels is not None:
            shared += 1
            conflicts += test.classes[label] not in labels
    return Overlap(duplicates, shared, conflicts)
