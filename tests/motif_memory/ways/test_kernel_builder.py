"""`csrc/build.toml`, for the builder of Hugging Face's kernels, names every source and only known fields."""

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

CSRC = Path(__file__).parents[3] / "csrc"
# Edition 5: kernels-data/src/config/v5.rs of https://github.com/huggingface/kernels, read in November 2026.
GENERAL = {"name", "version", "edition", "license"}, {"upstream", "source", "cuda", "hub", "kernel-depends"}
TORCH = {"include", "minver", "maxver", "pyext", "src", "stable-abi", "cxx-flags"}
CUDA = {"backend", "depends", "src"}, {"cuda-capabilities", "cuda-flags", "cuda-minver", "cxx-flags", "include"}


@pytest.fixture(scope="module")
def build():
    if not CSRC.is_dir():
        pytest.skip("not a checkout")
    return tomllib.loads((CSRC / "build.toml").read_text())


def test_the_fields_are_those_of_edition_5(build):
    assert set(build) == {"general", "torch", "kernel"}
    general = build["general"]
    assert GENERAL[0] | {"backends"} <= set(general) <= GENERAL[0] | GENERAL[1] | {"backends"}
    assert general["edition"] == 5 and set(general["backends"]) <= {"cpu", "cuda"}
    assert set(build["torch"]) <= TORCH
    for kernel in build["kernel"].values():
        assert CUDA[0] <= set(kernel) <= CUDA[0] | CUDA[1] and kernel["backend"] == "cuda"
    assert (CSRC / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").is_file()


def test_every_source_is_named_once(build):
    named = build["torch"]["src"] + [file for kernel in build["kernel"].values() for file in kernel["src"]]
    there = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert sorted(named) == sorted(str(path.relative_to(CSRC)) for path in there)
