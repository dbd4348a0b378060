"""Tables: what any program writes is read as it is written, and what is no table is refused by name."""

import bz2
import csv
import gzip
import io
import lzma
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram.evaluation.tables import class_name, counted, in_order, is_missing, place, read_table, text_table
from gengram.support.errors import InputError

COLUMNS = ["sequence", "label"]


def cells(path: Path, columns=COLUMNS) -> list[list[str]]:
    return read_table(path, columns).values.tolist()


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "sequence,label\nACG,1\nNA,nan\n"),
        ("a.tsv", "sequence\tlabel\nACG\t1\nNA\tnan\n"),
        ("a.txt", "sequence\tlabel\nACG\t1\nNA\tnan\n"),
        ("a.TAB", "sequence\tlabel\nACG\t1\nNA\tnan\n"),
        ("a", "label\tsequence\n1\tACG\nnan\tNA\n"),
        ("a.tsv", "sequence,label\nACG,1\nNA,nan\n"),  # the name is wrong
        ("a.csv", "sequence\tlabel\nACG\t1\nNA\tnan\n"),
        ("a.csv", "sequence;label\nACG;1\nNA;nan\n"),  # Excel where the comma is for decimals
        ("a.csv", "\ufeffsequence,label\r\nACG,1\r\nNA,nan\r\n"),  # Excel
        ("a.csv", '\ufeff"sequence","label"\n"ACG","1"\n"NA","nan"\n'),
        ("a.csv", " label , other,sequence \n1,x,ACG\nnan,y,NA\n\n\n"),
        ("a.csv", ",sequence,label\n0,ACG,1\n1,NA,nan\n"),  # pandas with its index
    ],
)
@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress, lzma.compress])
def test_cells_are_the_text_that_is_written(name, text, compress, tmp_path):
    content = text.encode()
    path = tmp_path / name
    if compress is not None:
        content, path = compress(content), tmp_path / f"{name}.{compress.__module__[:2]}"
    path.write_bytes(content)
    assert cells(path) == [["ACG", "1"], ["NA", "nan"]]
    assert [place(read_table(path, COLUMNS), row) for row in (0, 1)] == ["line 2", "line 3"]


def test_quoted_cells_hold_anything(tmp_path):
    (tmp_path / "a.csv").write_text('sequence,label\n"AC\nGT","a, ""b"""\nAAA,c\n')
    table = read_table(tmp_path / "a.csv", COLUMNS)
    assert table.values.tolist() == [["AC\nGT", 'a, "b"'], ["AAA", "c"]]
    assert [place(table, 0), place(table, 1)] == ["line 3", "line 4"]


def test_cells_as_long_as_chromosomes(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\n" + "A" * 1_000_000 + ",1\n")
    assert len(cells(tmp_path / "a.csv")[0][0]) == 1_000_000


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz", "no_suffix"])
def test_parquet_is_known_by_its_content(name, tmp_path):
    table = pd.DataFrame(
        {
            "sequence": [b"ACG", b"NA", b""],
            "label": [1.0, np.nan, 0.5],
            "number": pd.array([2**60 + 1, None, 3], dtype="Int64"),
            "truth": [True, False, True],
            "single": np.array([0.1, 1, 2], dtype=np.float32),
        }
    )
    content = table.to_parquet(index=False)
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    found = read_table(tmp_path / name, list(table.columns))
    assert found["sequence"].tolist() == ["ACG", "NA", ""]
    assert found["label"].tolist() == ["1.0", "", "0.5"]
    assert found["number"].tolist() == ["1152921504606846977", "", "3"]  # not by way of floats
    assert found["truth"].tolist() == ["True", "False", "True"]
    assert [np.float32(float(cell)) for cell in found["single"]] == table["single"].tolist()
    assert place(found, 2) == "row 3"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"seq,label\nA,1\n", r"a\.csv: expected the columns 'sequence', 'label', got 'seq'"),
        ("a.csv", b"sequence,label,label\nA,1,0\n", r"expected one column 'label', got more of this name"),
        (
            "a.csv",
            b"sequence,label\nA,1,\n",
            r"a\.csv, line 2: expected 2 cells as in the header, got 3: 'A', '1', ''",
        ),
        ("a.csv", b"sequence,label\nA,1\n\nA\n", r"a\.csv, line 4: expected 2 cells as in the header, got 1"),
        (
            "a.csv",
            b'sequence,label\nA,"1\nA,0\n',
            r"a\.csv, line 3: cells cannot be told apart: unexpected end of data",
        ),
        ("a.csv", b'sequence,label\n"A"C,1\n', r"a\.csv, line 2: .*',' expected after '\"'"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"\n", r"a\.csv: expected the columns 'sequence', 'label', got none"),
        (
            "a.tsv",
            b"##fileformat=VCFv4.2\n#CHROM\tPOS\n",
            r"a\.tsv: expected a CSV, TSV or Parquet file, got VCF; write",
        ),
        ("a.csv", b">r\nACGT\n", r"a\.csv: expected a CSV, TSV or Parquet file, got FASTA"),
        ("a.csv", b'[{"sequence": "A"}]\n', r"a\.csv: .* got JSON"),
        ("a.csv", b"PK\x03\x04\x14\x00\x06\x00", r"a\.csv: expected CSV or TSV as text, got a zip archive"),
        ("a.csv", "sequence,label\nA,1\n".encode("utf-16"), r"a\.csv: .*UTF-16; save it as UTF-8"),
        (
            "a.csv",
            b"sequence,label\nA,\xe4\n",
            r"a\.csv, line 2: expected CSV or TSV as UTF-8 text, got the byte 0xe4",
        ),
        ("a.csv", b"sequence,label\nA,\0\n", r"a\.csv: .*\(NUL\)"),
        (
            "a.csv.gz",
            gzip.compress(b"sequence,label\nA,1\n", mtime=0)[:-9],
            r"a\.csv\.gz: its gzip data ends in the middle",
        ),
        ("a.parquet", b"sequence,label\nA,1\n", r"a\.parquet: expected a Parquet file"),
        ("a.parquet", pd.DataFrame({"sequence": ["A"]}).to_parquet()[:-20], r"a\.parquet: expected a Parquet file"),
        ("a.parquet", pd.DataFrame({"sequence": ["A"]}).to_parquet(), r"a\.parquet: expected the columns"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", r"a\.csv: this is a Git LFS"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            r"parquet: this is a Git",
        ),
    ],
)
def test_what_is_no_table_is_refused_by_name(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as found:
        read_table(tmp_path / name, COLUMNS)
    assert "\n" not in str(found.value)


def test_folders_and_what_is_read_once_are_refused(tmp_path):
    for path in (tmp_path, Path("-"), Path("/dev/null")):
        with pytest.raises(InputError, match="got a folder, a pipe or a device"):
            read_table(path, COLUMNS)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_table(tmp_path / "absent.csv", COLUMNS)


@pytest.mark.parametrize(
    "cell, name",
    [
        *[("1", "1"), ("1.0", "1"), ("1.", "1"), (" 1.000 ", "1"), ("-0.0", "0"), ("1.5", "1.5"), ("007", "007")],
        *[("+0", "0"), ("+1", "1"), ("-1", "-1"), ("+-1", "+-1"), ("+", "+")],
        *[("1e3", "1e3"), ("NA", "NA"), ("True", "True"), (" two words ", "two words"), ("", "")],
    ],
)
def test_names_of_classes(cell, name):
    assert class_name(cell) == name


def test_classes_are_in_the_order_of_numbers_or_letters():
    assert in_order(["10", "2", "-1", "2"]) == ["-1", "2", "10"]
    assert in_order(["nonbinding", "binding"]) == ["binding", "nonbinding"]
    assert in_order(["10", "2", "NA"]) == ["10", "2", "NA"] and in_order([]) == []


def test_words_for_nothing_are_missing_among_numbers_only():
    assert is_missing(pd.Series(["1", "nan", "0.5", "", "NA"])).tolist() == [False, True, False, True, True]
    assert is_missing(pd.Series(["NA", "EU", "none", ""])).tolist() == [False, False, False, True]
    assert is_missing(pd.Series([], dtype=object)).tolist() == []


def test_counts_in_words():
    assert counted(["b", "a", "b"]) == "'b' (2), 'a' (1)"
    assert re.search("and 5 more$", counted(map(str, range(15))))


def test_tables_in_memory_count_rows_from_1():
    table = text_table({"sequence": ["A", None], "label": [1, float("nan")]})
    assert table.values.tolist() == [["A", "1"], ["", ""]] and place(table, 1) == "row 2"


LINES = st.lists(st.text("ACG,;\t\"' \r\n#>é1", max_size=12), max_size=6)


def check_csv(content: bytes, path: Path) -> None:
    """Either one line that names the file, or what the strict reader of the standard library gives."""
    path.write_bytes(content)
    try:
        found = cells(path)
    except InputError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return
    text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    head = text.split("\n")[0].strip()
    delimiter = next(
        d for d in ",\t;" if {*COLUMNS} <= {cell.strip() for cell in next(csv.reader([head], delimiter=d))}
    )
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    header = [cell.strip() for cell in rows[0]]
    assert {len(row) for row in rows} == {len(header)}
    chosen = [header.index(name) for name in COLUMNS]
    assert found == [[row[index].replace("\r\n", "\n") for index in chosen] for row in rows[1:]]


def fuzz_csv(examples: int, folder: Path) -> None:
    contents = st.one_of(
        st.binary(max_size=60),
        LINES.map(lambda lines: "\n".join(["sequence,label", *lines]).encode()),
        LINES.map(lambda lines: "\r\n".join(["label\tx\tsequence", *lines]).encode()),
        LINES.map(lambda lines: gzip.compress("\n".join(["sequence;label", *lines]).encode(), mtime=0)),
    )

    @settings(max_examples=examples, deadline=None)
    @given(contents)
    def check(content):
        check_csv(content, folder / "a.csv")

    check()


def test_some_mutated_tables(tmp_path):
    fuzz_csv(200, tmp_path)


@pytest.mark.slow
def test_ten_thousand_mutated_tables(tmp_path):
    fuzz_csv(10_000, tmp_path)
