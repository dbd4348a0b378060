"""What is raised for a user, and how names and sizes are put into words."""

import difflib
import errno
import os
import reprlib
from collections.abc import Iterable, Sequence

from .printable import printable


class InputError(ValueError):
    """A file, a name or an option that cannot be used; the message names it and says what to do."""


class ConversionError(ValueError):
    """A checkpoint or folder that cannot be used; the message says what was expected, what came, and what to do."""


class FetchError(Exception):
    """The Hub could not be reached or did not send what it should; another try may succeed.

    No `OSError`, which `zipfile` takes for a damaged archive.
    """


class MissingExtraError(ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PLAIN_WORDS = {
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EISDIR: "this is a folder, expected a file",
    errno.ENOTDIR: "a part of this path is not a folder",
    errno.EEXIST: "exists already",
    errno.ENOTEMPTY: "this folder is not empty",
    errno.ENOSPC: "no space is left on the disk; free some, or write to another disk",
    errno.EDQUOT: "your disk quota is used up; free some space, or write to another disk",
    errno.EFBIG: "the file would be larger than the system allows (see `ulimit -f`)",
    errno.EROFS: "the disk can only be read",
    errno.ENAMETOOLONG: "this name is too long",
    errno.ELOOP: "symbolic links that lead in a circle",
    errno.EMFILE: "too many files are open (see `ulimit -n`)",
    errno.EIO: "the disk reports an error in reading or writing",
    errno.ESTALE: "the network disk no longer knows this file",
    errno.ENXIO: "nothing to read from: a socket or device that is not there",
}


def plain_words(error: OSError) -> str:
    """What the system refused, in words and with the file's name; an error with a text of its own is that text."""
    if error.errno is None:
        return str(error)
    names = [
        printable(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    ]
    has_own_text = not names and error.strerror not in (None, "", os.strerror(error.errno))
    if has_own_text and error.errno not in DISK_IS_FULL:
        return str(error.strerror)
    words = _PLAIN_WORDS.get(error.errno) or error.strerror or str(error)
    if error.errno == errno.EEXIST and len(names) == 1 and os.path.isfile(str(error.filename)):
        words = "this is a file, expected a folder"
    return f"{' and '.join(names)}: {words}" if names else words


def quoted(names: Iterable[str], known: Sequence[str] = (), limit: int = 10) -> str:
    """Up to `limit` names in quotes, each with the nearest of `known` if one is near, and how many more there are."""
    names = list(names)
    known = list(known)[:4096]
    words = []
    for name in names[:limit]:
        nearest = difflib.get_close_matches(name, known, n=1)
        words.append(f"{shortened(name)} (nearest: {shortened(nearest[0])})" if nearest else shortened(name))
    if len(names) > limit:
        words.append(f"and {len(names) - limit} more")
    return ", ".join(words)


def shortened(value: object) -> str:
    """A `repr` of bounded length, also for values from a hostile file (nested, shared, very long)."""
    printer = reprlib.Repr()
    printer.maxlevel, printer.maxstring, printer.maxother, printer.maxlong = 2, 120, 120, 60
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        return printer.repr(value)
    except ValueError:  # integers with thousands of digits inside a container
        return f"a {type(value).__name__} that cannot be printed"


def size_text(number_of_bytes: int) -> str:
    """Bytes in words: `1.5 GB` (decimal units)."""
    size = float(number_of_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
