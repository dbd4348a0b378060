"""Writes the examples of one split as Parquet files of bounded size."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_MOST_ROWS = 4096  # that wait to be written
_MOST_TOKENS = 1 << 22
_BYTES_PER_FILE = 256 << 20


class ParquetShards:
    """Files of one split in a folder.

    Args:
        folder: where they go.
        split: how their names begin.
        schema: of the columns `input_ids` and `origin`.
    """

    def __init__(self, folder: Path, split: str, schema: pa.Schema):
        self.folder, self.split, self.schema = folder, split, schema
        self.rows: list[dict[str, Any]] = []
        self.waiting_tokens = 0
        self.writer: pq.ParquetWriter | None = None
        self.files: list[Path] = []
        self.bytes_in_file = 0
        folder.mkdir(exist_ok=True)

    def add(self, example: dict[str, Any]) -> None:
        """Add an example; it may wait in memory."""
        self.rows.append(example)
        self.waiting_tokens += len(example["input_ids"])
        if len(self.rows) >= _MOST_ROWS or self.waiting_tokens >= _MOST_TOKENS:
            self._flush()

    def finish(self) -> None:
        """Write all that waits, and name the files as the Hub does, `train-00000-of-00002.parquet`."""
        self._flush()
        self._close_file()
        for path in self.files:
            path.rename(path.with_name(f"{path.stem}-of-{len(self.files):05d}.parquet"))

    def abandon(self) -> None:
        """Close the file after an error elsewhere, and write no more; what was written is of no use."""
        with contextlib.suppress(Exception):  # such as the error that led here, again
            self._close_file()

    def _flush(self) -> None:
        if not self.rows:
            return
        ids = [row["input_ids"] for row in self.rows]
        flat = pa.array(np.concatenate(ids))
        ids_type = self.schema.field("input_ids").type
        if pa.types.is_fixed_size_list(ids_type):
            tokens: pa.Array = pa.FixedSizeListArray.from_arrays(flat, type=ids_type)
        else:
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int32)
            tokens = pa.ListArray.from_arrays(pa.array(offsets), flat, type=ids_type)
        origin = pa.array([row["origin"] for row in self.rows], type=self.schema.field("origin").type)
        if self.writer is None or self.bytes_in_file > _BYTES_PER_FILE:
            self._close_file()
            self.files.append(self.folder / f"{self.split}-{len(self.files):05d}.parquet")
            self.writer = pq.ParquetWriter(self.files[-1], self.schema, compression="zstd")
        self.writer.write_table(pa.Table.from_arrays([tokens, origin], schema=self.schema))
        self.bytes_in_file += len(flat)
        self.rows, self.waiting_tokens = [], 0

    def _close_file(self) -> None:
        writer, self.writer, self.bytes_in_file = self.writer, None, 0
        if writer is not None:
            writer.close()
