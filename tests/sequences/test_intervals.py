import gzip

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gengram.sequences.intervals import Interval, parse_region, read_bed
from gengram.support.errors import InputError

LENGTHS = {"chr1": 5000, "2": 300, "HLA:A*01": 40, "HLA:A*01:1-2": 20, "empty": 0}


def bed(tmp_path, text: str, lengths=None) -> list[Interval]:
    path = tmp_path / "x.bed"
    path.write_bytes(text.encode())
    return list(read_bed(path, lengths))


def test_bed_as_it_comes(tmp_path):
    text = (
        "browser position chr1:1-2\r\n# comment\n\ntrack name=x\nchr1\t0\t5000\ta b\t0\t-\textra\r\n"
        "chr1\t7\t8\t.\t.\t.\t\n2 10 20 x 0 + y\n"
    )
    expected = [Interval("chr1", 0, 5000, "a b", "-"), Interval("chr1", 7, 8), Interval("2", 10, 20, "x", "+")]
    assert bed(tmp_path, text, LENGTHS) == expected
    (tmp_path / "x.bed.gz").write_bytes(gzip.compress(text.encode()))
    assert list(read_bed(tmp_path / "x.bed.gz")) == expected
    assert [len(interval) for interval in expected] == [5000, 1, 10] and str(expected[2]) == "2:11-20"


@pytest.mark.parametrize(
    "text, message",
    [
        ("chr1\t5\n", "line 1: expected at least 3 columns"),
        ("chr1\t5\t9\nchr1\t5\t9\tx\n", "line 2: expected 3 columns, as in line 1"),
        ("#c\nchr1\t5\t5\n", "line 2: expected 0 <= start < end .*got '5' and '5'"),
        ("chr1\t6\t5\n", "expected 0 <= start < end"),
        ("chr1\t-1\t5\n", "expected 0 <= start < end"),
        ("chr1\t1_0\t50\n", "expected 0 <= start < end"),
        ("chr1\t 1\t5\n", "expected 0 <= start < end"),
        ("chr1\t1e3\t5000\n", "expected 0 <= start < end"),
        ("chr1\t1\t1,000\n", "expected 0 <= start < end"),
        ("chr1\t\u0663\t50\n", "expected 0 <= start < end"),
        ("chr1\t1\t" + "9" * 5000 + "\n", "expected 0 <= start < end"),
        ("chrom\tstart\tend\n", "if this is a header, let it start with '#'"),
        ("chr1\t1\t5\tx\t0\tplus\n", r"strand \+, - or \."),
        ("\t1\t5\n", "a record's name in column 1"),
        ("chr1 \t1\t5\n", "no blanks around it"),
        ("chr1\x1b[2J\t1\t5\n", r"can be shown .*got 'chr1\\x1b\[2J'"),
        ("chr1\t0\t5001\n", "its end is 5,001, but 'chr1' has 5,000 bases"),
        ("chr2\t0\t5\n", "no record 'chr2', but there is '2'"),
        ("1\t0\t5\n", "no record '1', but there is 'chr1'"),
        ("HLA:A\t0\t5\n", "no record 'HLA:A' .nearest: 'HLA:A"),
        ("empty\t0\t1\n", "'empty' has 0 bases"),
        ("# nothing\n", "at least one BED line, got none"),
        ("chr1\t0\t5\rchr1\t0\t5\n", r"got \\r alone"),
    ],
)
def test_a_bad_line_is_named(text, message, tmp_path):
    with pytest.raises(InputError, match=rf"x\.bed(, line \d+)?: .*{message.split(': ', 1)[-1]}") as caught:
        bed(tmp_path, text, LENGTHS)
    assert message.split(": ")[0] in str(caught.value) or not message.startswith("line")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("chr1:1,000-2,000", Interval("chr1", 999, 2000)),
        ("chr1:5-5", Interval("chr1", 4, 5)),
        ("chr1:4999-", Interval("chr1", 4998, 5000)),
        ("chr1:-3", Interval("chr1", 0, 3)),
        ("2", Interval("2", 0, 300)),
        ("HLA:A*01", Interval("HLA:A*01", 0, 40)),
        ("HLA:A*01:3-4", Interval("HLA:A*01", 2, 4)),
        ("{HLA:A*01}:1-2", Interval("HLA:A*01", 0, 2)),
        ("{HLA:A*01:1-2}", Interval("HLA:A*01:1-2", 0, 20)),
        ("HLA:A*01:1-2:3-4", Interval("HLA:A*01:1-2", 2, 4)),
    ],
)
def test_regions_count_from_one(text, expected):
    assert parse_region(text, LENGTHS) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("chr1:0-3", "expected 1 <= start <= end, got 0 and 3"),
        ("chr1:5-4", "expected 1 <= start <= end, got 5 and 4"),
        ("chr1:1-5001", "its end is 5,001, but 'chr1' has 5,000 bases"),
        ("chr1:6000-", "expected 1 <= start <= end"),
        ("chr1:1000", "expected RECORD:START-END"),
        ("chr1:", "expected RECORD:START-END"),
        ("chr1:-", "expected RECORD:START-END"),
        ("chr1:1,0-20", "expected RECORD:START-END"),
        ("chr1:1_0-20", "expected RECORD:START-END"),
        ("chr1:1e2-200", "expected RECORD:START-END"),
        ("chr1:+1-2", "expected RECORD:START-END"),
        ("chr1:1-2-3", "expected RECORD:START-END"),
        ("chr1:\u0661-\u0662", "expected RECORD:START-END"),
        ("{chr1}1-2", "expected RECORD:START-END"),
        ("chr1:1-" + "9" * 5000, "at most 18 digits"),
        ("HLA:A*01:1-2", "expected one record, got two"),
        ("chr2:1-2", "no record 'chr2', but there is '2'"),
        ("", "no record ''"),
        ("empty", "'empty' has 0 bases"),
        ("chr9\x1b[2J:1-2", r"'chr9\\x1b\[2J"),
    ],
)
def test_a_region_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_region(text, LENGTHS)
    assert str(caught.value).isprintable()


@example(1, 1).via("one base")
@given(st.integers(1, 30), st.integers(1, 30))
def test_bases_are_those_of_samtools(tmp_path_factory, first, last):
    pysam = pytest.importorskip("pysam")
    path = tmp_path_factory.getbasetemp() / "samtools.fa"
    sequence = "ACGTTGCAAATTCCGGATATCGCGTTAACC"
    if not path.exists():
        path.write_text(f">chr1\n{sequence}\n")
    text = f"chr1:{first}-{last}"
    if first > last:
        with pytest.raises(InputError):
            parse_region(text, {"chr1": 30})
        return
    interval = parse_region(text, {"chr1": 30})
    with pysam.FastaFile(str(path)) as file:
        found = file.fetch(region=text)
    assert found == sequence[interval.start : interval.end] and str(interval) == text
