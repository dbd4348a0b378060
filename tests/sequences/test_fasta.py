import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.sequences import fasta, pieces
from gengram.sequences.fasta import fasta_pieces, read_fasta, stream_fasta
from gengram.sequences.pieces import whole_records
from gengram.support.errors import InputError


def parsed(content: bytes, **options) -> list[tuple[str, str]]:
    return list(whole_records(fasta_pieces(io.BytesIO(content), "x.fa", **options)))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_case_and_order_are_kept(compress, tmp_path):
    path, digest = tmp_path / "a.fa", hashlib.sha256()
    path.write_bytes(compress(b">b 1\r\nacGT\r\nNN\r\n\r\n>a\nT\n"))
    assert list(read_fasta(path)) == [("b", "acGTNN"), ("a", "T")]
    list(stream_fasta(path, digest))
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "content, records",
    [
        (b">a\rAC\rGT\r>b\rT", [("a", "ACGT"), ("b", "T")]),
        (b"\n \n>a\nAC  \t\nGT \n\n>b", [("a", "ACGT"), ("b", "")]),
        (b">a\nAC GT\n AC\n", [("a", "AC GT AC")]),
        (b">a\n\n>b\n>c x>y\nA;C*-.\n", [("a", ""), ("b", ""), ("c", "A;C*-.")]),
        ("> é à\nAC".encode(), [("é", "AC")]),
        (b">a caf\xe9\x01\nAC", [("a", "AC")]),  # only the name is read, not the description
    ],
)
def test_what_belongs_to_a_sequence(content, records):
    assert parsed(content) == records


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ACGT\n", r"line 1: expected FASTA \('>' and a name\), got 'ACGT'"),
        (b"\n\n>", "line 3: expected a name after '>'"),
        (b"\n \n", "expected at least one FASTA record, got none"),
        (b">a\nA\n>\nACGT\n", "line 3: expected a name after '>'"),
        (b"@r\nACGT\n+\nIIII\n", "line 1: .*looks like FASTQ"),
        (b"##fileformat=VCFv4.2\n", "line 1: .*looks like VCF"),
        (b"LOCUS       X\n", "line 1: .*looks like GenBank"),
        (b"\x1b[2J\n>a\nAC\n", r"line 1: .*got '\\x1b\[2J'"),
        (b">a\nAC\n>b\nACGT>c\nAC\n", "line 4: '>' stands in the middle of a line"),
        (b">a\nAC\n  >c\nAC\n", "line 3: '>' stands in the middle of a line"),
        (b">a\nAC\n;x\n", "line 3: a line starts with ';'"),
        (b">a\n;x\n", "line 2: a line starts with ';'"),
        (b">a\nAC\nA\0C\n", "line 3: expected letters, got the byte 0x00"),
        (b">a\nAC\xc2\xa0\n", "line 2: expected letters, got the byte 0xc2"),
        (b">a\nAC\x0b\n", "line 2: expected letters, got the byte 0x0b"),
        (b">a\nA\n>b\nC\n>a x\nG\n", "line 5: the name 'a' .the first word. was used in line 1 already"),
        (b">\xff\nAC\n", "line 1: expected a name in UTF-8"),
        (b">a\x1b[31m\nAC\n", r"line 1: expected a name of characters that can be shown, got 'a\\x1b\[31m'"),
        ("> a\u202eb\nAC\n".encode(), r"line 1: .*got 'a\\u202eb'"),
        (b">" + b"x" * (fasta.LONGEST_HEADER + 1), "line 1: expected a header of at most 1,048,576 bytes"),
        (b">a\nA" + b" " * (1 << 20) + b"C", "line 2: expected letters, got more than 65,536 blanks"),
    ],
)
def test_what_is_not_fasta_is_named_with_its_line(content, message):
    with pytest.raises(InputError, match=f"^x.fa(, |: ){message}") as caught:
        parsed(content)
    assert str(caught.value).isprintable()


def test_names_may_repeat_where_that_is_asked_for():
    content = b">a\nA\n>a#2\nC\n>a\nG\n>a\nT\n>b\n"
    assert [name for name, _ in parsed(content, repeated_names="keep")] == ["a", "a#2", "a", "a", "b"]
    assert [name for name, _ in parsed(content, repeated_names="number")] == ["a", "a#2", "a#3", "a#4", "b"]
    with pytest.raises(InputError, match="repeated_names as one of fail, number, keep, got 'x'"):
        parsed(content, repeated_names="x")


LINE = st.text("ACGTNacgtn-X ", max_size=9).map(lambda line: line.rstrip(" "))
RECORD = st.tuples(st.text("abc|:", min_size=1, max_size=4), st.lists(LINE, max_size=4))


@given(st.lists(RECORD, min_size=1, max_size=5), st.sampled_from(["\n", "\r\n", "\r", " \n"]), st.integers(2, 40))
def test_places_where_blocks_end_make_no_difference(records, end, size):
    text = "".join(f">{name} words{end}" + "".join(line + end for line in lines) for name, lines in records)
    expected = [(name, "".join(lines)) for name, lines in records]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "LONGEST_PIECE", size)
        found = list(fasta_pieces(io.BytesIO(text.encode()), "x.fa", repeated_names="keep"))
    assert list(whole_records(found)) == expected
    place = 0
    for piece in found:
        assert piece.start == place
        place = 0 if piece.is_last else place + len(piece.text)


def test_real_records_equal_those_of_pysam():
    pysam = pytest.importorskip("pysam")
    from shared_files import DATA

    files = sorted((DATA / "genome_vertebrate_ENm").glob("*.fa.gz"))[:3]
    for path in files or pytest.skip("real data is absent"):
        with pysam.FastxFile(str(path)) as file:
            assert [(record.name, record.sequence) for record in file] == list(read_fasta(path))


@pytest.mark.parametrize("line", [60, 0])
def test_memory_does_not_grow_with_a_record(line, tmp_path):
    def peak(size: int) -> int:
        bases = np.random.default_rng(0).choice(list(b"ACGT"), size).astype(np.uint8).tobytes()
        text = b"\n".join(re.findall(b".{1,60}", bases)) if line else bases
        (tmp_path / "a.fa").write_bytes(b">a\n" + text)
        tracemalloc.start()
        try:
            assert sum(len(piece.text) for piece in stream_fasta(tmp_path / "a.fa")) == size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(4 << 20), peak(16 << 20)
    assert large < 1.2 * small < 12 * pieces.LONGEST_PIECE


def test_a_device_without_end_is_refused_at_once():
    with pytest.raises(InputError, match=r"/dev/zero: expected FASTA as text, got bytes that are not text \(NUL\)"):
        list(read_fasta("/dev/zero"))
    with pytest.raises(InputError, match="/dev/null is empty"):
        list(read_fasta(os.devnull))
