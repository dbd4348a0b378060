"""What tells a file from another under the same name."""

import hashlib
from pathlib import Path

from .progress import progress_bar

_PIECE = 2**22  # bytes that are read at once


def sha256_of(path: Path, progress: str | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal; a large file is read piece by piece.

    Args:
        path: the file.
        progress: what is written in front of a progress bar; None for no bar.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file, progress_bar(progress, "B", total=path.stat().st_size) as bar:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
