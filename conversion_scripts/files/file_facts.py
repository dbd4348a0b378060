"""What the system says of files, before they are read and after: whether they stayed the same for hours."""

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from ...support.errors import ConversionError, quoted
from ..hub.hub_path import HubPath, SourcePath, relative_name

HASHED = 2**20  # bytes up to which a file's content is looked at; larger ones would take as long as a conversion

Facts: TypeAlias = tuple[int | str, ...]


def facts_of(file: SourcePath) -> Facts | None:
    """Size, time of the last change (ns), inode and, of a small file, SHA-256; `None` if it is no file.

    A file on the Hub has its size and identity at its commit, which do not change.
    """
    if isinstance(file, HubPath):
        return (file.file.size, file.file.identity) if file.is_file() else None
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return None
        with open(file, "rb") as opened:  # network disks ask the server again when a file is opened
            found = os.fstat(opened.fileno())
            content = hashlib.sha256(opened.read(HASHED)).hexdigest() if found.st_size <= HASHED else ""
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ino, content)


def facts_in(folder: SourcePath) -> dict[SourcePath, Facts]:
    """The facts of all files in a folder and in the folders inside it."""
    found = {}
    for child in folder.iterdir():
        for file in child.iterdir() if child.is_dir() else (child,):
            facts = facts_of(file)
            if facts is not None:
                found[file] = facts
    return found


def check_unchanged(folder: SourcePath, files: Iterable[SourcePath], before: Mapping[SourcePath, Facts]) -> None:
    """Refuses what was read of files of a folder if they are no longer as they were before.

    Raises:
        ConversionError: if one of them changed; the message names up to ten.
        FileNotFoundError: if none changed, but one is gone.
    """
    now = {file: facts_of(file) for file in files}
    changed = [file for file, facts in now.items() if facts is not None and facts != before.get(file)]
    if changed:
        names = quoted(relative_name(file, folder) for file in changed)
        raise ConversionError(
            f"{folder}: files were changed while they were read: {names}. What was read of them is a mixture, and "
            "nothing of it is kept. Let the program that writes there finish, such as a training run, or make a copy; "
            "then run the same command again"
        )
    gone = [file for file, facts in now.items() if facts is None]
    if gone:
        names = quoted(relative_name(file, folder) for file in gone)
        raise FileNotFoundError(f"{folder}: files were removed while they were read: {names}; put them back")
