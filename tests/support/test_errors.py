import errno

import pytest

from gengram.support.errors import plain_words


@pytest.mark.parametrize(
    "error, words",
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.fa"), "x.fa: no such file or folder"),
        (PermissionError(errno.EACCES, "Permission denied", "a\x1bb"), r"a\x1bb: permission denied"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a and b: Invalid cross-device link"),
        (OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left"), "no space is left"),
        (OSError(errno.ENOENT, "no weights in the folder"), "no weights in the folder"),
        (OSError("a text of its own"), "a text of its own"),
        (OSError(-2, "Name or service not known"), "Name or service not known"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"x\xff"), r"x\udcff: no such file or folder"),
    ],
)
def test_what_the_system_refuses_is_said_without_numbers(error, words):
    assert plain_words(error).startswith(words) and "rrno" not in plain_words(error)
