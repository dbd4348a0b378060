"""Everything that can be wrong with a file before its first line is read."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zlib

import pytest
from shared_files import DATA, needs_data

from gengram.support import input_file
from gengram.support.errors import InputError
from gengram.support.input_file import is_read_once, open_input, read_text

TEXT = "".join(random.Random(0).choices("ACGT\n", k=300_000)).encode()
COMPRESSIONS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def content(path, digest=None) -> bytes:
    with open_input(path, "FASTA", digest) as file:
        return file.read()


def bgzip(data: bytes, path) -> bytes:
    pysam = pytest.importorskip("pysam")
    with pysam.BGZFile(str(path), "w") as file:
        file.write(data)
    return path.read_bytes()


@pytest.mark.parametrize("compress", [bytes, *COMPRESSIONS.values()])
@pytest.mark.parametrize("text", [b">", TEXT])
def test_content_and_hash_are_those_of_the_file(compress, text, tmp_path):
    path, digest = tmp_path / "file", hashlib.sha256()
    path.write_bytes(compress(text))
    assert content(path, digest) == text
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()
    path.write_bytes(compress(text) + compress(b"") + compress(text))
    assert content(path) == text * 2


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressed_data_may_be_followed_by_zeros_only(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(COMPRESSIONS[kind](TEXT) + bytes(100_000))
    assert content(path) == TEXT
    for rest in (b"x", bytes(99_999) + b"x", b"\n", b"\x1f"):
        path.write_bytes(COMPRESSIONS[kind](TEXT) + rest)
        with pytest.raises(InputError, match=rf"file: something that is not {kind} follows its {kind} data; "):
            content(path)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_truncated_data_is_never_read_as_if_it_were_whole(kind, tmp_path):
    path, whole = tmp_path / "file", COMPRESSIONS[kind](TEXT)
    for length in [
        *range(2 if kind == "gzip" else 7, 40),
        *range(41, len(whole), 7919),
        *range(len(whole) - 30, len(whole)),
    ]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"file: its {kind} data ends in the middle; copy or download"):
            content(path)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_flipped_bit_never_changes_the_text_silently(kind, tmp_path):
    path, whole = tmp_path / "file", bytearray(COMPRESSIONS[kind](TEXT[:3000]))
    refused = 0
    for place in range(len(whole)):
        whole[place] ^= 1 << place % 8
        path.write_bytes(whole)
        try:
            assert content(path) == TEXT[:3000]  # of a time stamp, or of a reserved bit that has no meaning
        except InputError as error:
            assert "\n" not in str(error) and "file" in str(error)
            refused += 1
        whole[place] ^= 1 << place % 8
    assert refused > 0.98 * len(whole)


def test_a_bgzip_file_cut_between_two_blocks_is_truncated_though_each_block_is_whole(tmp_path):
    path = tmp_path / "file.gz"
    whole = bgzip(TEXT, path)
    assert content(path) == TEXT
    end_mark = 28
    path.write_bytes(whole[:-end_mark])
    assert gzip.decompress(path.read_bytes()) == TEXT  # a gzip reader finds nothing wrong
    with pytest.raises(InputError, match=r"file\.gz: its last bgzip block is missing"):
        content(path)
    second = whole.index(b"\x1f\x8b\x08\x04", 10)
    path.write_bytes(whole[:second])
    with pytest.raises(InputError, match="its last bgzip block is missing"):
        content(path)
    path.write_bytes(whole + whole)
    assert content(path) == TEXT * 2


@needs_data
def test_every_compressed_file_of_real_data_is_read_as_gzip_reads_it():
    files = [path for path in sorted(DATA.rglob("*.gz")) if path.stat().st_size < 1_000_000]
    assert len(files) > 20
    for path in files:
        with gzip.open(path) as file:
            assert content(path) == file.read()


def tar_of(text: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("chr1.fa")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    return file.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"file is empty, expected a FASTA file"),
        (gzip.compress(b"", mtime=0), "file holds nothing when it is decompressed"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"file: .*Git LFS pointer.*git lfs pull",
        ),
        (gzip.compress(gzip.compress(TEXT), mtime=0), "compressed twice; decompress it once: `gzip -d .*file`"),
        (b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00", "got compressed by zstd; decompress it first: `zstd -d .*file`"),
        (b"PK\x03\x04abc", "got a zip archive; unpack it first: `unzip .*file`"),
        (gzip.compress(tar_of(TEXT), mtime=0), "got a tar archive; unpack it first"),
        (b"\n<!DOCTYPE html><html>404", "got a web page; download the file itself"),
        (gzip.compress(b"BAM\x01\0\0", mtime=0), "got BAM"),
        (b"PAR1abc", "got Parquet"),
        (b"\xff\xfe>\0a\0", "got text in UTF-16; save it as UTF-8"),
        (b">a\nAC\0GT", r"got bytes that are not text \(NUL\)"),
        (bytes(5000), r"got bytes that are not text \(NUL\)"),
    ],
)
def test_what_is_not_text_is_named_with_what_to_do(data, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        content(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_not_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT)
    assert content(path) == TEXT


def test_what_cannot_be_opened_is_said_in_plain_words(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^.*no\.fa: no such file or folder$"):
        content(tmp_path / "no.fa")
    with pytest.raises(InputError, match=f"^{tmp_path} is a folder, expected a FASTA file"):
        content(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"a part of this path is not a folder$"):
        content(tmp_path / "file" / "x")
    with pytest.raises(OSError, match=r"this name is too long$"):
        content(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match=r"a\\x00b: a file's name cannot hold NUL"):
        content("a\0b")
    with pytest.raises(OSError, match=r"a\\x1b\[31mb: no such file"):
        content("a\x1b[31mb")


def test_a_pipe_is_read_once_and_its_hash_is_that_of_its_bytes(tmp_path):
    path, digest = tmp_path / "pipe", hashlib.sha256()
    os.mkfifo(path)
    data = gzip.compress(TEXT, mtime=0)
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    assert is_read_once(path) and not is_read_once(__file__) and is_read_once("-")
    assert content(path, digest) == TEXT
    assert digest.digest() == hashlib.sha256(data).digest()
    writer.join()


def test_a_pipe_without_a_writer_is_an_error_and_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(input_file, "WAIT_FOR_A_WRITER", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is a pipe that holds nothing and nobody writes into"):
        content(tmp_path / "pipe")


def test_standard_input_has_the_name_of_a_dash():
    code = "from gengram.support.input_file import open_input; print(len(open_input('-', 'FASTA').read()))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=gzip.compress(TEXT, mtime=0), capture_output=True, check=True
    )
    assert int(done.stdout) == len(TEXT)
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "standard input is empty, expected a FASTA file" in done.stderr


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_memory_stays_small_whatever_the_input_claims_to_be(kind, tmp_path):
    path, size = tmp_path / "bomb", 64 << 20
    path.write_bytes(COMPRESSIONS[kind](b"A" * size))
    assert path.stat().st_size < size // 500
    with open_input(path, "FASTA") as file:
        tracemalloc.start()
        try:
            total = sum(len(block) for block in iter(lambda: file.read(1 << 16), b""))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert total == size and peak < 16 << 20


def test_small_texts_have_a_limit_and_are_utf8(tmp_path):
    path = tmp_path / "file"
    path.write_bytes("é\r\n".encode())
    assert read_text(path, "YAML") == "é\r\n"
    with pytest.raises(InputError, match=r"file: expected a YAML file of at most 3 B, it is larger"):
        read_text(path, "YAML", most=3)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=r"file: expected YAML as UTF-8 text, got the byte 0xe9"):
        read_text(path, "YAML")


def test_a_checksum_of_gzip_is_checked(tmp_path):
    path, data = tmp_path / "file", bytearray(gzip.compress(b">a\nACGT\n", mtime=0))
    assert data[-8:-4] == zlib.crc32(b">a\nACGT\n").to_bytes(4, "little")
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"file: its gzip data is damaged \(.*incorrect data check\)"):
        content(path)
