import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.sequences import fastq, pieces
from gengram.sequences.fastq import stream_fastq
from gengram.sequences.pieces import pieces_of, whole_records
from gengram.sequences.sequence_files import read_sequences
from gengram.support.errors import InputError

READS = b"@r1/1 x\nACGTN\n+\nIII!~\n@r2\r\nAC\r\n+r2\r\n@@\r\n@r1/1\n\n+\n\n\n\n"
RECORDS = [("r1/1", "ACGTN"), ("r2", "AC"), ("r1/1", "")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_fastq_and_fasta_are_told_apart_by_their_start(compress, tmp_path):
    path = tmp_path / "reads"
    path.write_bytes(compress(READS))
    assert list(read_sequences(path)) == RECORDS
    assert list(whole_records(stream_fastq(path))) == RECORDS
    path.write_bytes(compress(b">a\nAC\nGT\n"))
    assert list(read_sequences(path)) == [("a", "ACGT")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"@\nAC\n+\nII\n", "line 1: expected FASTQ"),
        (b"@a\nAC\n+\nII\nb\nAC\n+\nII\n", "line 5: expected FASTQ .*got 'b'"),
        (b"@a\nAC\n+\nI\n", r"line 4: expected as many qualities as the record 'a' has bases \(2\), got 1"),
        (b"@a\nAC\nGT\n+\nIIII\n", r"line 3: expected '\+'"),
        (b"@a\nAC\n+b\nII\n", r"line 3: expected '\+'"),
        (b"@a\nAC\n+\n", "line 1: its record 'a' is cut off"),
        (b"@a\nA C\n+\nIII\n", "line 2: expected printable ASCII without blanks, got the byte 0x20"),
        (b"@a\nAC\n+\nI\x7f\n", "line 4: .*got the byte 0x7f"),
        (b"@a\x1b\nAC\n+\nII\n", r"line 1: expected a name .*got 'a\\x1b'"),
        (b"@a\nAC\n+\nII\n\n@b\nAC\n+\nII\n", "line 5: expected a record .*got a blank line"),
        (b"@a\n" + b"A" * 99, "line 2: expected at most 64 bytes"),
    ],
)
def test_what_is_not_fastq_is_named_with_its_line(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(fastq, "LONGEST_READ", 64)
    path = tmp_path / "x.fq"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.fq, {message}"):
        list(read_sequences(path))


def test_a_fastq_file_without_records_is_an_error(tmp_path):
    (tmp_path / "x.fq").write_text("\n\n")
    with pytest.raises(InputError, match="at least one FASTQ record"):
        list(stream_fastq(tmp_path / "x.fq"))


@given(st.text("ACGT", max_size=30), st.integers(1, 12))
def test_pieces_of_a_sequence_are_the_sequence(sequence, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LONGEST_PIECE", longest)
        found = list(pieces_of("a", sequence))
    assert list(whole_records(found)) == [("a", sequence)]
    assert all(len(piece.text) <= longest and sequence[piece.start :].startswith(piece.text) for piece in found)
    assert [piece.is_last for piece in found] == [False] * (len(found) - 1) + [True]
