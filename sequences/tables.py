"""Rows of tables, as a stream: Parquet, and text with a line of names."""

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..support.errors import InputError, quoted
from ..support.input_file import is_read_once, shown_name
from ..support.printable import printable
from .text_lines import MOST_BYTES_OF_A_LINE, read_lines

_ROWS_AT_ONCE = 1 << 14
_PARQUET = b"PAR1"


def is_parquet(path: str | Path) -> bool:
    """Whether a file (that can be read at any place) is Parquet, by how it starts."""
    if is_read_once(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def table_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where each row is, for messages, and its cells in these columns as text; empty where there is no value.

    Parquet, or text whose first line names its columns, separated by tabs, or else by commas. Case does not matter in
    names, nor a `#` in front. Other columns are left out.

    Raises:
        InputError: if a column is missing or there twice, a row has more or fewer cells than the first line, or the
            file is damaged or something else.
        OSError: if it cannot be read.
    """
    if is_parquet(path):
        return _parquet_rows(Path(path), columns)
    return text_rows(read_lines(path, f"a table with the columns {', '.join(columns)}"), shown_name(path), columns)


def column_names(path: str | Path) -> list[str]:
    """The names of a table's columns, in lower case and without a `#` in front; otherwise as `table_rows`."""
    if is_parquet(path):
        with _open_parquet(Path(path)) as file:
            return _plain(file.schema_arrow.names)
    return _plain(_names_in(next(read_lines(path, "a table"), "")))


def text_rows(lines: Iterator[str], name: str, columns: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The same of the lines of a text, which messages call `name`."""
    first = next(lines, "")
    is_tabular, names = "\t" in first, _names_in(first)
    places = _places(names, columns, f"{name}, line 1")
    for number, cells in _split_tabs(lines) if is_tabular else _split_commas(lines, name):
        where = f"{name}, line {number}"
        if len(cells) != len(names):
            what = f"{len(cells)} cells" if any(cells) else "a blank line"
            raise InputError(f"{where}: expected {len(names)} cells, as the first line has, got {what}.")
        yield where, tuple(cells[place] for place in places)


def _names_in(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else next(csv.reader([line]), [])


def _plain(names: Sequence[str]) -> list[str]:
    return [name.strip().lstrip("#").lower() for name in names]


def _split_tabs(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, start=2):
        yield number, line.split("\t")


def _split_commas(lines: Iterator[str], name: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES_OF_A_LINE))  # a cell may be a whole line
    rows = csv.reader(lines, strict=True)
    try:
        for cells in rows:
            yield rows.line_num + 1, cells
    except csv.Error as error:
        where = f"{name}, line {rows.line_num + 1}"
        raise InputError(f"{where}: expected cells separated by commas, but {error}.") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    name = shown_name(path)
    number = 0
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        chosen = [names[place] for place in _places(names, columns, name)]
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=chosen):
            for cells in zip(*(batch.column(column).to_pylist() for column in chosen), strict=True):
                number += 1
                yield f"{name}, row {number}", tuple(map(_text, cells))


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A Parquet file; what Arrow says of damage, inside the block too, is said with the file's name."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # of damage, Arrow raises any of these
        raise InputError(
            f"{shown_name(path)}: expected Parquet, but it is damaged ({printable(' '.join(str(error).split()))})."
        ) from None


def _text(cell: Any) -> str:
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "replace")
    if isinstance(cell, float) and cell.is_integer():  # a column of whole numbers of which some are missing
        return str(int(cell))
    return "" if cell is None else str(cell)


def _places(names: Sequence[str], columns: Sequence[str], where: str) -> list[int]:
    """Where the wanted columns are among the names."""
    found = _plain(names)
    for column in columns:
        if found.count(column) != 1:
            raise InputError(
                f"{where}: expected the columns {', '.join(columns)}, each once, got {found.count(column)} of "
                f"{column!r} among {quoted(names)}."
            )
    return [found.index(column) for column in columns]
