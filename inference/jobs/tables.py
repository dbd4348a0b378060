"""Outputs that are tables, written piece by piece."""

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
    options = pa.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="needed")
    with output.open("wb") as file:
        file.write(("\t".join(schema.names) + "\n").encode())  # Arrow would put the names in quotes
        with pa.csv.CSVWriter(file, schema, write_options=options) as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
    write_whole(output.with_name(f"{output.name}.json"), json.dumps(record, indent=2) + "\n")
