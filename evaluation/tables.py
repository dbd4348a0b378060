"""Tables of text: CSV, TSV and Parquet files, plain or compressed. No cell is guessed to be empty, or a number."""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from ..sequences.text_lines import read_lines
from ..support.decompression import OUTPUT_BLOCK, compression_of, decompressed
from ..support.errors import InputError, quoted, shortened
from ..support.input_file import is_read_once, shown_name
from ..support.lfs_pointer import refuse_lfs_pointer
from ..support.printable import printable

csv.field_size_limit(2**31 - 1)  # a cell may be a chromosome; the library's limit is 131,072 characters

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}
_NO_NUMBER = ("nan", "na", "n/a", "null", "none", "inf", "-inf")
_COMPRESSED = (".gz", ".bgz", ".bz2", ".xz")
_FOREIGN = {
    "##fileformat=VCF": "VCF; write the variants and their labels into a table, for example with `bcftools query`",
    ">": "FASTA; a table has a header and a label in each row (a suite takes FASTA files as {CLASS: FILE, ...})",
    "@": "FASTQ or SAM; a table has a header and a label in each row",
    "{": "JSON; write it as CSV",
    "[": "JSON; write it as CSV",
}  # how the first line of another format begins, and what to do


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a file as text, the cells as they are written; those of no value are `""`.

    Rows are indexed by their line of the file (row, for Parquet), and the index is named so: see `place`. Numbers and
    truth values of Parquet are written as Python writes them. What separates cells (comma, tab or semicolon) is told
    by the file's name, or by its header where that contradicts.

    Args:
        path: of a CSV, TSV (`.tsv`, `.tab`, `.txt`) or Parquet file, also compressed; UTF-8.
        columns: names of the columns wanted.

    Raises:
        InputError: if the file is no such table, a column is missing or there twice, or a row has more or fewer cells
            than the header; the message names the file and the line.
        OSError: if it cannot be read.
    """
    if is_read_once(path):
        raise InputError(f"{shown_name(path)}: expected a CSV, TSV or Parquet file, got a folder, a pipe or a device.")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PAR1" or ".parquet" in _suffixes(path)[-1:]:
        return _read_parquet(path, columns)
    return _read_delimited(path, columns)


def place(table: pd.DataFrame, row: int) -> str:
    """Where a row (counted from 0) of a table is in its file: `line 12`."""
    return f"{table.index.name} {table.index[row]}"


def text_table(columns: Mapping[str, Iterable[Any]]) -> pd.DataFrame:
    """A table of values that are in memory, as `read_table` gives it; rows count from 1."""
    table = pd.DataFrame({name: [_as_text(value) for value in values] for name, values in columns.items()})
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


def class_name(cell: str) -> str:
    """The name of a class: a whole number is one class however it is written, as `1`, `1.0`, `+1` or ` 1 `."""
    text = cell.strip()
    whole = re.fullmatch(r"(?:\+|(-?))(\d+)(?:\.0*)?", text)
    text = (whole[1] or "") + whole[2] if whole else text
    return "0" if text == "-0" else text


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, each once: numbers by their size, others by their letters."""
    found = sorted(set(names))
    return sorted(found, key=float) if all(map(is_number, found)) else found


def is_missing(names: pd.Series) -> np.ndarray:
    """Which classes are none: empty cells, and words such as `nan` where all others are numbers; (rows,) bool.

    Among words, `NA` and `none` are names like any other.
    """
    missing = (names == "").to_numpy()
    words = names.str.lower().isin(_NO_NUMBER).to_numpy()
    others = names[~missing & ~words].unique()
    return missing | words if len(others) and all(map(is_number, others)) else missing


def is_number(text: str) -> bool:
    """Whether a cell is a number, as `float` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def counted(values: Iterable[str], limit: int = 10) -> str:
    """Values and how often each occurs, the most frequent first, for errors: `'1' (12), 'x' (3)`."""
    counts = pd.Series(list(values), dtype=object).value_counts()
    words = [f"{shortened(value)} ({count:,})" for value, count in counts[:limit].items()]
    return ", ".join(words + ([f"and {len(counts) - limit} more"] if len(counts) > limit else []))


def _as_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value.decode() if isinstance(value, bytes) else str(value)


def _suffixes(path: Path) -> list[str]:
    """Of the file's name in lower case, without those of compression."""
    return [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]


def _check_columns(path: Path, columns: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise InputError(f"{shown_name(path)}: expected the columns {quoted(columns)}, got {quoted(found) or 'none'}.")
    repeated = [name for name in columns if found.count(name) > 1]
    if repeated:
        raise InputError(f"{shown_name(path)}: expected one column {quoted(repeated)}, got more of this name.")


def _read_parquet(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    name = shown_name(path)
    with open(path, "rb") as raw:
        blocks = iter(lambda: raw.read(OUTPUT_BLOCK), b"")
        start = next(blocks, b"")
        refuse_lfs_pointer(start, name, InputError)
        compression = compression_of(start)
        blocks = itertools.chain([start], blocks)
        content = b"".join(decompressed(blocks, compression, name) if compression else blocks)
    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(content), page_checksum_verification=True) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            table = file.read(list(columns))
            return text_table({name: table[name].to_pylist() for name in columns})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: expected a Parquet file: {printable(' '.join(str(error).split()))}.") from None


def _read_delimited(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    name = shown_name(path)
    lines = (line + "\n" for line in read_lines(path, "CSV or TSV"))
    first = next(lines)
    for start, kind in _FOREIGN.items():
        if first.startswith(start):
            raise InputError(f"{name}: expected a CSV, TSV or Parquet file, got {kind}.")
    rows = csv.reader(itertools.chain([first], lines), delimiter=_delimiter(path, first), strict=True)
    cells: list[list[str]] = []
    numbers: list[int] = []
    try:
        header = [cell.strip() for cell in next(rows, [])]
        _check_columns(path, columns, header)
        places = [header.index(column) for column in columns]
        for row in rows:
            if len(row) == len(header):
                cells.append([row[index] for index in places])
                numbers.append(rows.line_num)
            elif row:  # an empty line is no row
                raise InputError(
                    f"{name}, line {rows.line_num}: expected {len(header)} cells as in the header, got {len(row)}: "
                    f"{quoted(row, limit=5)}."
                )
    except csv.Error as error:
        raise InputError(
            f"{name}, line {rows.line_num}: cells cannot be told apart: {printable(str(error))}."
        ) from None
    table = pd.DataFrame(cells, columns=list(columns), dtype=object)
    table.index = pd.Index(numbers, name="line", dtype="int64")
    return table


def _delimiter(path: Path, header: str) -> str:
    """What the file's name says, unless the header holds none of it, but another."""
    by_name = _DELIMITERS.get("".join(_suffixes(path)[-1:]))
    found = [delimiter for delimiter in "\t,;" if delimiter in header]
    if by_name in found or not found:
        return by_name or ","
    return found[0]
