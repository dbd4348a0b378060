"""Names that come from files and arguments: shown without being obeyed, and kept from becoming paths."""

import re

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?")


def printable(name: object, most: int = 200) -> str:
    r"""A name as a terminal may show it: control characters (as of ANSI escapes), marks that turn the direction of
    writing, and what is not Unicode become `\x1b` and the like; of a very long name the middle is left out.

    >>> printable("chr1\x1b[2J")
    'chr1\\x1b[2J'
    """
    text = str(name)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """A message of several lines, each as `printable` has it but of any length."""
    return "\n".join(printable(line, most=len(line)) for line in text.split("\n"))


def is_file_name(name: str) -> bool:
    """Whether `name` can name a file on every system: ASCII letters, digits, `_`, `-`, dots inside; at most 100."""
    return len(name) <= 100 and _PLAIN_NAME.fullmatch(name) is not None and ".." not in name
