"""Git LFS pointers: the few lines of text that a clone holds instead of a large file that was not fetched."""

import re
from pathlib import Path

from .errors import size_text

POINTER_BYTES = 1024  # a pointer is shorter (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)

_HEADS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def is_lfs_pointer(first_bytes: bytes) -> bool:
    """Whether a file that starts like this is a Git LFS pointer; its first 64 bytes are enough."""
    return first_bytes.startswith(_HEADS)


def refuse_lfs_pointer(first_bytes: bytes, path: str | Path, error: type[Exception] = ValueError) -> None:
    """Raise `error` if the file is a Git LFS pointer.

    Args:
        first_bytes: how the file starts; of `POINTER_BYTES` the message also says how large the real file is.
        path: what the message calls it.
        error: what is raised.
    """
    if is_lfs_pointer(first_bytes):
        size = re.search(rb"^size (\d{1,20})$", first_bytes, re.MULTILINE)
        missing = f" of {size_text(int(size[1]))}" if size else ""
        raise error(
            f"{path}: this is a Git LFS pointer, the file{missing} that it stands for was not fetched; run "
            "`git lfs install` and `git lfs pull` in the clone, or download the file itself."
        )
