import gzip

import pytest

from gengram.sequences.fasta import read_fasta


def test_case_and_order_are_kept(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">b 1\r\nacGT\r\nNN\r\n\r\n>a\nT\n")
    assert list(read_fasta(path)) == [("b", "acGTNN"), ("a", "T")]
    with gzip.open(tmp_path / "a.fa.gz", "wb") as file:
        file.write(path.read_bytes())
    assert list(read_fasta(tmp_path / "a.fa.gz")) == list(read_fasta(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ACGT\n", r"line 1: expected FASTA \('>' and a name\), got 'ACGT'"),
        (b"", "at least one FASTA record, got none"),
        (b">a\nA\n>\nACGT\n", "line 3: expected a name after '>'"),
        (b"\xff\xfe\x00", "expected FASTA text, got bytes that are not text"),
    ],
)
def test_what_is_not_fasta_is_named(content, message, tmp_path):
    path = tmp_path / "bad.fa"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_fasta(path))
