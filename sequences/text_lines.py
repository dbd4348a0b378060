"""Lines of text files, plain or compressed, and the numbers in them."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..support.errors import InputError
from ..support.input_file import as_text, open_input, shown_name

MOST_BYTES_OF_A_LINE = 1 << 24


def read_lines(path: str | Path, kind: str) -> Iterator[str]:
    r"""Lines of a file, plain or compressed (gzip, bgzip, bzip2, xz), without their ends (`\n` or `\r\n`).

    Args:
        path: the file; `-` is standard input.
        kind: what it should be, for errors: `GTF`.

    Raises:
        InputError: if the file is damaged or no text, or a line has more than `MOST_BYTES_OF_A_LINE`.
        OSError: if it cannot be read.
    """
    name = shown_name(path)
    with open_input(path, kind) as file:
        number = 0
        while line := file.readline(MOST_BYTES_OF_A_LINE + 1):
            number += 1
            here = f"{name}, line {number}"
            if len(line) > MOST_BYTES_OF_A_LINE:
                raise InputError(f"{here}: expected {kind} lines of at most {MOST_BYTES_OF_A_LINE:,} bytes, got more.")
            text = as_text(line, here, kind).removesuffix("\n").removesuffix("\r")
            if "\r" in text:
                raise InputError(
                    f"{here}: expected line ends of \\n or \\r\\n, got \\r alone; convert it with `tr '\\r' '\\n'`."
                )
            yield text


def whole_number(cell: str) -> int | None:
    """A number of at most 18 digits 0 to 9; None for anything else, as signs, blanks, `1_000`, or other scripts."""
    return int(cell) if re.fullmatch(r"[0-9]{1,18}", cell) else None
