"""Outputs that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import DISK_IS_FULL, plain_words
from .printable import printable
from .work_folder import work_folder


@contextlib.contextmanager
def whole_folder(output: str | Path, restart: bool | None = None) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well, and goes when it does not.

    Args:
        output: the folder to be.
        restart: whether to delete what a run that was killed left there; None if users have no option to say so.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder, or is a link or a mount point.
        InputError: if another process writes it, or one that was killed left its work and `restart` is not true.
        OSError: if the disk is full; in place of the error that the block met with.
    """
    output = Path(os.path.abspath(output))
    check_output_is_free(output)
    with work_folder(output, restart) as folder, _full_disk_named(output):
        yield folder
        folder.chmod(0o777 & ~_umask())
        check_output_is_free(output)
        if output.is_dir():
            output.rmdir()
        os.replace(folder, output)


def check_output_is_free(output: Path) -> None:
    """Refuses what a folder could not take the name of.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder, or is a link or a mount point.
    """
    if output.is_symlink() or os.path.ismount(output):
        what = "a symbolic link" if output.is_symlink() else "a mount point"
        raise FileExistsError(f"{printable(output)} is {what}; name a new folder (one inside it, for example).")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{printable(output)} exists already; choose another output or remove it first.")


@contextlib.contextmanager
def _full_disk_named(output: Path) -> Iterator[None]:
    """Says of a full disk which output it was met with; libraries that write do not."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        words = plain_words(OSError(error.errno, ""))
        raise OSError(f"{printable(output)} was not written: {words}. Nothing of it is kept.") from error


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file through a temporary one, so that readers never see half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _full_disk_named(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
