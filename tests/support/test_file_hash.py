"""Hashes of files are those of the system's own tools."""

import pytest

from gengram.support import file_hash
from gengram.support.file_hash import sha256_of


def test_the_hash_is_that_of_sha256sum(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hash, "_PIECE", 2)
    file = tmp_path / "file"
    file.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    file.write_bytes(b"")
    assert sha256_of(file) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_progress_is_shown_on_request_only(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    sha256_of(file)
    assert capsys.readouterr().err == ""
    sha256_of(file, "reading file")
    assert "reading file" in capsys.readouterr().err


def test_what_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")
