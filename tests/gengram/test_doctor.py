"""`gengram doctor` says what runs, and why not more."""

import json

import pytest
import torch

from gengram import memory_path
from gengram.cli import main
from gengram.motif_memory.ways import native
from gengram.motif_memory.ways.native import NativeStatus


def test_json_names_versions_and_kernels(capsys):
    with memory_path("token_major", "torch"):
        assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_path"] == {"algorithm": "token_major", "kernels": "torch"}
    assert found["torch"] and found["transformers"]
    assert found["native_kernels"]["available"] is native.status().available


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (NativeStatus(False, "the native kernels are not built"), "no: the native kernels are not built"),
        (NativeStatus(True, "", "lib.so", "avx2"), "yes, avx2"),
        (NativeStatus(True, "", "lib.so", "avx2", False, "built without nvcc"), "no: built without nvcc"),
        (NativeStatus(True, "", "lib.so", "avx2", True, ""), "yes" if torch.cuda.is_available() else "finds no GPU"),
    ],
)
def test_text_says_why(status, expected, monkeypatch, capsys):
    monkeypatch.setattr(native, "status", lambda: status)
    assert main(["doctor"]) == 0
    assert expected in capsys.readouterr().out
