"""How processes that share one output begin: nobody looks at what is finished before process 0 has tidied up.

Process 0 tidies the folder, and then writes a new random word into `start.json`. Each of the others answers with that
word and one of its own in `here-1`, and process 0 adds their words to `start.json`. What a run that was killed has
left holds other words, so nobody takes it for an answer. Files suffice for that, on any disk that the processes share.
"""

import contextlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

from ...support.printable import printable
from ...support.whole_output import write_whole

LONGEST_WAIT = 1800.0  # seconds for all processes to begin, as long as those of PyTorch wait for one another
_POLL = 0.2  # seconds between two looks


def let_others_begin(folder: Path, count: int) -> None:
    """Called by process 0 when the folder is tidy: returns when all of so many processes know that.

    Raises:
        TimeoutError: if one of them does not begin.
    """
    word = secrets.token_hex(8)
    write_whole(folder / "start.json", json.dumps({"word": word, "answers": {}}))
    answers: dict[str, str] = {}
    end = time.monotonic() + LONGEST_WAIT
    while len(answers) < count - 1:
        for index in map(str, range(1, count)):
            found = _read(folder / f"here-{index}")
            if index not in answers and found.get("to") == word:
                answers[index] = found["word"]
        if len(answers) < count - 1:
            missing = [str(index) for index in range(1, count) if str(index) not in answers]
            _wait(end, f"process {', '.join(missing[:10])} of {count}", folder)
    write_whole(folder / "start.json", json.dumps({"word": word, "answers": answers}))


def wait_to_begin(folder: Path, index: int) -> None:
    """Called by the others: returns when process 0 has tidied the folder, or has even finished and removed it.

    Raises:
        TimeoutError: if process 0 does not begin.
    """
    own, answered = secrets.token_hex(8), None
    end = time.monotonic() + LONGEST_WAIT
    while folder.exists():
        start = _read(folder / "start.json")
        if start and start["answers"].get(str(index)) == own:
            return
        if start and start["word"] != answered:
            answered = start["word"]
            write_whole(folder / f"here-{index}", json.dumps({"to": answered, "word": own}))
        _wait(end, "process 0", folder)


def _read(path: Path) -> dict[str, Any]:
    """What another process wrote, whole; nothing if it has not yet, or writes it anew on a disk in a network."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_bytes()))
    return {}


def _wait(end: float, others: str, folder: Path) -> None:
    if time.monotonic() > end:
        raise TimeoutError(
            f"{others} did not begin within {LONGEST_WAIT / 60:.0f} minutes to work in {printable(folder)}; expected "
            "all processes that RANK and WORLD_SIZE name to be started together, as torchrun does: start them again."
        )
    time.sleep(_POLL)
