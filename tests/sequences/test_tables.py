"""Tables as streams of rows: a damaged file is always one line that names it."""

import random

import pyarrow as pa
import pyarrow.parquet
import pytest

from gengram.sequences.tables import column_names, table_rows
from gengram.support.errors import InputError

COLUMNS = ["name", "sequence"]


@pytest.fixture
def table(tmp_path):
    rows = {"name": [f"r{row}" for row in range(200)], "sequence": ["ACGT" * (row % 7) for row in range(200)]}
    path = tmp_path / "table.parquet"
    pa.parquet.write_table(pa.table(rows), path, write_page_checksum=True)
    return path, list(zip(*rows.values(), strict=True))


def test_rows_of_parquet(table):
    path, rows = table
    assert column_names(path) == COLUMNS and [cells for _, cells in table_rows(path, COLUMNS)] == rows


def test_a_flipped_bit_of_parquet_is_refused_or_changes_nothing(table):
    path, rows = table
    content = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            names, found = column_names(path), [cells for _, cells in table_rows(path, COLUMNS)]
        except InputError as error:
            assert "table.parquet" in str(error) and str(error).isprintable()
            refused += 1
        else:
            assert names == COLUMNS and (found == rows or place >= len(content) - 2000)  # no checksum of the footer
    assert refused > len(content) / 3


@pytest.mark.parametrize("size", [4, 8, 100, -1])
def test_cut_parquet_is_refused(size, table):
    path, _ = table
    path.write_bytes(path.read_bytes()[:size])
    for read in (column_names, lambda path: list(table_rows(path, COLUMNS))):
        with pytest.raises(InputError, match=r"table\.parquet: expected Parquet, but it is damaged"):
            read(path)
