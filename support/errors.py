"""What is raised for a user, and how names and sizes are put into words."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence


class ConversionError(ValueError):
    """A checkpoint or folder that cannot be used; the message says what was expected, what came, and what to do."""


class FetchError(Exception):
    """The Hub could not be reached or did not send what it should; another try may succeed.

    No `OSError`, which `zipfile` takes for a damaged archive.
    """


class MissingExtraError(ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


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
