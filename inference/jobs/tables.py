"""Outputs that are tables, written piece by piece."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ...support.whole_output import write_whole
from .record import record_json

TABLE_SUFFIXES = (".parquet", ".tsv")


def check_table_output(output: Path, allowed: Iterable[str] = TABLE_SUFFIXES) -> None:
    """Refuse an output whose name does not say its format.

    Raises:
        ValueError: for another ending.
    """
    allowed = tuple(allowed)
    if not output.name.endswith(allowed):
        raise ValueError(f"--output: expected a name that ends in {', '.join(allowed)}, got {output.name!r}.")


def beside_table(output: Path) -> list[Path]:
    """Where `write_table` puts the record of a table that cannot hold it."""
    return [] if output.suffix == ".parquet" else [record_place(output)]


def record_place(output: Path) -> Path:
    """Where the record of an output is that cannot hold it."""
    return output.with_name(f"{output.name}.json")


def write_table(tables: Iterable[pa.Table], output: Path, record: dict[str, Any], schema: pa.Schema) -> None:
    """Write rows to a `.parquet` or `.tsv` file, and how they were made.

    Parquet keeps the record in the file's metadata under `gengram`; beside a TSV stands `NAME.tsv.json`.

    Args:
        tables: the rows, in pieces of this schema.
        output: the file.
        record: of the run.
        schema: columns, so that a table without rows has them too.
    """
    if output.suffix == ".parquet":
        schema = schema.with_metadata({"gengram": record_json(record)})
        with pa.parquet.ParquetWriter(output, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.cast(schema).replace_schema_metadata(schema.metadata))
        return
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(
            file, delimiter="\t", lineterminator="\n"
        )  # quotes only what holds tabs, quotes, line ends
        writer.writerow(schema.names)
        for table in tables:
            writer.writerows(zip(*(column.to_pylist() for column in table.cast(schema).columns), strict=True))
    write_whole(record_place(output), json.dumps(record, indent=2) + "\n")


def read_written(output: Path, schema: pa.Schema) -> pa.Table:
    """The rows of a table that `write_table` wrote.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    if output.suffix == ".parquet":
        return pa.parquet.read_table(output, partitioning=None).cast(schema)
    types = dict(zip(schema.names, schema.types, strict=True))
    return pa.csv.read_csv(
        output,
        parse_options=pa.csv.ParseOptions(delimiter="\t"),
        convert_options=pa.csv.ConvertOptions(column_types=types, null_values=[""]),
    )


def record_of_table(output: Path) -> dict[str, Any] | None:
    """How a table was made, as `write_table` kept it; None if that cannot be read."""
    try:
        if output.suffix == ".parquet":
            text = (pa.parquet.read_schema(output).metadata or {})[b"gengram"].decode()
        else:
            text = record_place(output).read_text()
        record = json.loads(text)
    except (OSError, ValueError, KeyError):
        return None
    return record if isinstance(record, dict) else None
