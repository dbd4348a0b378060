"""Files that are almost right: valid ones with a few bytes changed, and what a reader may say of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gengram.support.errors import InputError

BYTES = [
    b"\0",
    b"\xff",
    b"\xc3\xa9",
    b"\xef\xbb\xbf",
    b"\x1b[31m",
    b"\r",
    b"\r\n",
    b"\n",
    b"\t",
    b" ",
    b"\x0b",
    b"\x1f\x8b",
]


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings of a slow test of so many inputs."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def damaged(draw: Any, valid: st.SearchStrategy[bytes], words: list[bytes], most: int = 3) -> bytes:
    """A valid file after up to `most` changes: something put in, taken out, repeated, or the end cut off."""
    content = draw(valid)
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 0, 1, 2, 7]))
        kind = draw(st.sampled_from(["word", "word", "byte", "repeat", "cut", "swap"]))
        if kind == "word":
            content = content[:place] + draw(st.sampled_from(words + BYTES)) + content[place + length :]
        elif kind == "byte":
            content = content[:place] + draw(st.binary(max_size=3)) + content[place + length :]
        elif kind == "repeat":
            content = content[:place] + content[max(0, place - 12) :]
        elif kind == "cut":
            content = content[:place]
        else:
            content = content[place:] + content[:place]
    return content


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What `read` makes of a file, or None if it refuses it; a refusal is one clear line that names the file."""
    try:
        return read(path)
    except (InputError, OSError) as error:
        text = str(error)
        assert text.isprintable() and path.name in text and "rrno" not in text and len(text) < 2000, text
        return None
