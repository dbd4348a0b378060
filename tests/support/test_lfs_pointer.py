import pytest

from gengram.support.errors import ConversionError
from gengram.support.lfs_pointer import is_lfs_pointer, refuse_lfs_pointer

POINTER = (  # the example of https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


def test_a_pointer_is_known_by_its_first_bytes():
    assert is_lfs_pointer(POINTER) and is_lfs_pointer(POINTER[:64])
    assert not is_lfs_pointer(b"version 1\n") and not is_lfs_pointer(b"") and not is_lfs_pointer(POINTER[:20])


def test_the_error_names_the_file_its_size_and_what_to_do():
    with pytest.raises(ConversionError, match=r"model\.pt: .*Git LFS pointer.* 12\.3 kB .*git lfs pull"):
        refuse_lfs_pointer(POINTER, "model.pt", ConversionError)
    with pytest.raises(ValueError, match=r"a\.fa: .*Git LFS pointer, the file that it stands for"):
        refuse_lfs_pointer(POINTER[:64], "a.fa")
    refuse_lfs_pointer(b">a\nACGT\n", "a.fa")
