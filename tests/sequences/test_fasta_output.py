import gzip
from pathlib import Path

import pytest

from gengram.sequences.fasta import read_fasta, stream_fasta
from gengram.sequences.fasta_output import check_fasta_output, fasta_output
from gengram.support.errors import InputError


@pytest.mark.parametrize("name", ["a.fa", "a.FA.GZ"])
@pytest.mark.parametrize("step", [1, 7, 80, 81, 1000])
def test_what_is_written_in_pieces_is_read_again(name, step, tmp_path):
    records = {f"r{length}": "ACGTn"[: length % 5 + 1] * length for length in (0, 1, 15, 16, 17, 40, 100)}
    with fasta_output(tmp_path / name) as writer:
        for record, bases in records.items():
            writer.begin(record, "with words" if record == "r1" else "")
            for start in range(0, len(bases), step):
                writer.add(bases[start : start + step])
    assert dict(read_fasta(tmp_path / name)) == records
    content = (tmp_path / name).read_bytes()
    text = gzip.decompress(content) if name.endswith("GZ") else content
    assert b">r1 with words\n" in text and text.endswith(b"\n") and b"\n\n" not in text
    assert max(map(len, text.split(b"\n"))) == 80
    assert {piece.name: piece.description for piece in stream_fasta(tmp_path / name)}["r1"] == "with words"


def test_compressed_bytes_do_not_depend_on_time_or_name(tmp_path):
    for name in ("a.fa.gz", "b.fa.gz"):
        with fasta_output(tmp_path / name) as writer:
            writer.begin("x")
            writer.add("ACGT" * 100)
    assert (tmp_path / "a.fa.gz").read_bytes() == (tmp_path / "b.fa.gz").read_bytes()


@pytest.mark.parametrize("header", [b">a one  two", b">a", b">a\tx", b">a \xc3\xa9\xff"])
def test_headers_are_kept(header, tmp_path):
    (tmp_path / "in.fa").write_bytes(header + b"\nACGT\n")
    with fasta_output(tmp_path / "out.fa") as writer:
        for piece in stream_fasta(tmp_path / "in.fa"):
            writer.begin(piece.name, piece.description)
            writer.add(piece.text)
    assert (tmp_path / "out.fa").read_bytes() == header.replace(b"\t", b" ") + b"\nACGT\n"


def test_other_names_are_refused():
    check_fasta_output(Path("x.fna.gz"))
    with pytest.raises(InputError, match=r"--output: expected a name that ends in .fa, .*, got 'x.txt'"):
        check_fasta_output(Path("x.txt"))
