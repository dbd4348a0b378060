"""Readers of sequence files beside strict readers written by others: none is laxer, none meets an error of its own."""

import bz2
import gzip
import lzma
import re

import pytest
from fuzzing import damaged, fuzz, outcome
from hypothesis import given
from hypothesis import strategies as st

from gengram.data_preparation.split_rules import read_split_rules
from gengram.sequences.annotation import read_transcripts
from gengram.sequences.fasta import read_fasta
from gengram.sequences.intervals import parse_region, read_bed
from gengram.sequences.sequence_files import read_sequences
from gengram.support.errors import InputError

pytestmark = pytest.mark.slow

NAME = st.text("ab|:.#é", min_size=1, max_size=4)
LINE = st.text("ACGTNacgtnRYX-*", max_size=12)
END = st.sampled_from([b"\n", b"\n", b"\r\n"])


@st.composite
def fasta(draw) -> bytes:
    end, text = draw(END), b""
    for name in draw(st.lists(NAME, min_size=1, max_size=4, unique=True)):
        text += b">" + name.encode() + draw(st.sampled_from([b"", b" words", b"\tx>y"])) + end
        for line in draw(st.lists(LINE, max_size=4)):
            text += line.encode() + end
    return text


@st.composite
def fastq(draw) -> bytes:
    end, text = draw(END), b""
    for name in draw(st.lists(NAME, min_size=1, max_size=4)):
        bases = draw(st.text("ACGTN", max_size=9)).encode()
        plus = b"+" + draw(st.sampled_from([b"", name.encode()]))
        text += end.join([b"@" + name.encode(), bases, plus, b"I" * len(bases), b""])
    return text


@st.composite
def bed(draw) -> bytes:
    end, columns, text = (
        draw(END),
        draw(st.integers(3, 7)),
        draw(st.sampled_from([b"", b"# c\n", b"track x\n", b"\n"])),
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, 300))
        stop = start + draw(st.sampled_from([1, 2, 50, 0]))
        cells = [
            "chr1",
            str(start),
            str(stop),
            draw(st.sampled_from(["x", ".", "a b"])),
            "0",
            draw(st.sampled_from("+-.")),
            "z",
        ]
        text += "\t".join(cells[:columns]).encode() + end
    return text


FASTA_WORDS = [b">", b">a\n", b";", b"@", b">\n", b" ", b"ACGT", b">a b\nAC", b"LOCUS "]
BED_WORDS = [
    b"-1",
    b"1e3",
    b"chr1",
    b"\t\t",
    b"5\t5",
    b"1_0",
    b"1,000",
    b"99999999999999999999",
    "٣".encode(),
    b"#",
    b"+",
    b"track",
]


def strict_fasta(content: bytes) -> list[tuple[str, str]] | None:
    """FASTA by its letter, line by line: None for anything that a strict reader stops at."""
    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    records: list[tuple[str, list[str]]] = []
    for line in content.split(b"\n"):
        if line.startswith(b">"):
            words = line[1:].split()
            try:
                name = words[0].decode()
            except (IndexError, UnicodeDecodeError):
                return None
            if not name.isprintable() or b"\0" in line or name in [known for known, _ in records]:
                return None
            records.append((name, []))
            continue
        line = line.rstrip(b" \t")
        if line and (not records or not re.fullmatch(rb"[\x20-\x7e\t]+", line) or line[:1] == b";" or b">" in line):
            return None
        if line:
            records[-1][1].append(line.decode())
    return [(name, "".join(lines)) for name, lines in records] or None


@fuzz(3000)
@given(damaged(fasta(), FASTA_WORDS))
def test_fasta(tmp_path, content):
    pysam, pyfaidx = pytest.importorskip("pysam"), pytest.importorskip("pyfaidx")
    path = tmp_path / "x.fa"
    path.write_bytes(content)
    found = outcome(lambda path: list(read_fasta(path)), path)
    if found is None:  # refused; that it is not refused without reason is for the other tests
        assert (
            strict_fasta(content) is None
            or re.match(rb"(\xef\xbb\xbf)?(\x1f\x8b|BZh|\xfd7zXZ|\xff\xfe)", content)
            or b"\0" in content
        )
        return
    assert found == strict_fasta(content)
    if re.search(rb"\r(?!\n)|[ \t](\r?\n|$)|\n[@+]|[^\0-\x7f]", content):
        return  # line ends and blanks are letters to the libraries, FASTQ may follow, descriptions have to be UTF-8
    with pysam.FastxFile(str(path)) as file:
        assert [(record.sequence or "").replace("\r", "") for record in file] == [sequence for _, sequence in found]
    path.with_name("x.fa.fai").unlink(missing_ok=True)
    try:
        names = list(pyfaidx.Fasta(str(path), rebuild=True).keys())
    except (pyfaidx.FastaIndexingError, ValueError, RuntimeError) as error:
        assert not re.search("Duplicate key|Unexpected text", str(error))  # only an index needs lines of one length
    else:
        assert names == [name for name, _ in found]


@fuzz(2500)
@given(fasta(), st.sampled_from([gzip.compress, bz2.compress, lzma.compress]), st.data())
def test_compressed_fasta(tmp_path, text, compress, data):
    strict = {gzip.compress: gzip.decompress, bz2.compress: bz2.decompress, lzma.compress: lzma.decompress}[compress]
    parts = st.lists(st.just(text), min_size=1, max_size=2).map(lambda texts: b"".join(map(compress, texts)))
    content = data.draw(damaged(parts, [b"\0" * 9, compress(b""), compress(b">c\nAC\n")], most=2))
    path = tmp_path / "x.fa"
    path.write_bytes(content)
    found = outcome(lambda path: list(read_fasta(path, repeated_names="keep")), path)
    if found is None or content[:1] == b">":
        return
    whole = strict(content)  # the library may not refuse what was accepted
    lines = whole.replace(b"\r\n", b"\n").split(b"\n")
    assert [name for name, _ in found] == [line[1:].split()[0].decode() for line in lines if line[:1] == b">"]
    assert sum(len(sequence) for _, sequence in found) == sum(len(line) for line in lines if line[:1] != b">")


@fuzz(1500)
@given(damaged(fastq(), [b"@", b"+", b"@a\n", b"+\nI\n", b">a\n", b"\nACGT\n"]))
def test_fastq(tmp_path, content):
    path = tmp_path / "x.fq"
    path.write_bytes(content)
    found = outcome(lambda path: list(read_sequences(path)), path)
    if found is None or not content.removeprefix(b"\xef\xbb\xbf").startswith(b"@"):
        return
    lines = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").rstrip(b"\r\n \t").split(b"\n")
    lines += [b""] * (-len(lines) % 4)  # of empty reads at the end
    for record, (name, sequence) in zip(range(0, len(lines), 4), found, strict=True):
        head, bases, plus, qualities = lines[record : record + 4]
        assert head[1:].split()[0].decode() == name and bases.decode() == sequence
        assert plus[:1] == b"+" and len(qualities) == len(bases) and head[:1] == b"@"


@fuzz(2500)
@given(damaged(bed(), BED_WORDS))
def test_bed(tmp_path, content):
    path = tmp_path / "x.bed"
    path.write_bytes(content)
    lengths = {"chr1": 400}
    found = outcome(lambda path: list(read_bed(path, lengths)), path)
    if found is None:
        return
    text = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\r")
    lines = [line for line in text.split("\n") if line.strip() and not re.match(r"#|\s*(track|browser)(\s|$)", line)]
    assert len(lines) == len(found)
    for line, interval in zip(lines, found, strict=True):
        cells = line.split("\t") if "\t" in line else line.split()
        assert cells[0] == "chr1" and all(re.fullmatch(r"\d+", cell, re.ASCII) for cell in cells[1:3])
        assert 0 <= int(cells[1]) < int(cells[2]) <= 400
        assert (interval.start, interval.end) == (int(cells[1]), int(cells[2]))
        assert interval.strand == (cells[5] if len(cells) > 5 else ".")


@fuzz(1500)
@given(st.text("chr1:-,0259{}X\x1b ٣", max_size=14) | st.from_regex(r"chr1:[0-9]{0,4}-?[0-9,]{0,5}", fullmatch=True))
def test_regions(text):
    try:
        interval = parse_region(text, {"chr1": 400, "chr1:2": 30})
    except InputError as error:
        assert str(error).isprintable()
        return
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[0-9][0-9,]*", text.rpartition(":")[2])]
    assert 0 <= interval.start < interval.end <= 400
    if text.startswith("chr1:") and not text.startswith("chr1:2") and len(numbers) == 2:
        assert [interval.start + 1, interval.end] == numbers


GTF = b'chr1\tx\texon\t3\t9\t.\t+\t.\tgene_id "g"; transcript_id "t";\nchr1\tx\tgene\t3\t9\t.\t+\t.\tgene_id "g";\n'
RULES = b"pattern\tsplit\tstart\tend\tkeep\n*:a\ttest\t5\t.\t\n*\ttrain\t\t\t0.25\n"


@fuzz(1000)
@given(damaged(st.just(GTF), [b"exon", b"-1", b"transcript_id", b"\t", b"1e1", b"99999999999999999999"]))
def test_gtf(tmp_path, content):
    path = tmp_path / "x.gtf"
    path.write_bytes(content)
    for transcript in outcome(read_transcripts, path) or ():
        assert all(0 <= start < end for start, end in transcript.exons) and transcript.strand in "+-"


@fuzz(1000)
@given(damaged(st.just(RULES), [b"../x", b"-1", b"1_0", b"nan", b"\t", b"-", b"99999999999999999999"]))
def test_tables_of_splits(tmp_path, content):
    path = tmp_path / "x.tsv"
    path.write_bytes(content)
    for rule in outcome(read_split_rules, path) or ():
        assert re.fullmatch(r"-|[A-Za-z0-9_.]+", rule.split) and 0 < rule.keep <= 1
        assert (rule.start or 0) >= 0 and (rule.end is None or rule.end > (rule.start or 0))
