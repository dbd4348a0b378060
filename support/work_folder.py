"""The hidden folder beside an output in which it is written, and what a process that was killed left in one.

.OUTPUT.partial/
    lock      held by the process that writes; the system frees it when that process ends, however
    folder/   becomes OUTPUT when it is whole
"""

import contextlib
import errno
import fnmatch
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, size_text
from .printable import printable

LOCK, _FOLDER = "lock", "folder"
_CONTENTS = {_FOLDER: stat.S_ISDIR}


def work_path(output: Path) -> Path:
    """Where an unfinished `output` lies."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def work_folder(output: Path, restart: bool | None) -> Iterator[Path]:
    """An empty folder to write `output` in, which nobody else writes; whatever is still in it at the end goes.

    SIGTERM and SIGHUP end the block like Control-C.

    Args:
        output: its parents are made.
        restart: whether what a killed process left is deleted first; None if the caller's users cannot say so.

    Raises:
        InputError: if something else is in the way, another process writes `output`, or one that was killed left its
            work and `restart` is not true; the message says what to do.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    work = work_path(output)
    with terminate_as_exit(), locked(work, output, _CONTENTS):
        try:
            if os.path.lexists(work / _FOLDER):
                if not restart:
                    raise InputError(_left_behind(work, restart))
                shutil.rmtree(work / _FOLDER)
            (work / _FOLDER).mkdir(mode=0o700)
        except BaseException:
            if not os.path.lexists(work / _FOLDER):
                _remove_empty(work)
            raise
        try:
            yield work / _FOLDER
        finally:
            shutil.rmtree(work / _FOLDER, ignore_errors=True)
            _remove_empty(work)


def _left_behind(work: Path, restart: bool | None) -> str:
    sizes = [path.lstat().st_size for path in work.rglob("*") if path.is_file() and not path.is_symlink()]
    remedy = "delete that folder" if restart is None else "give --restart to delete it and start anew"
    return (
        f"{printable(work)} holds {size_text(sum(sizes))} that an earlier run left when it was killed; it cannot be "
        f"continued: {remedy}."
    )


def _remove_empty(work: Path) -> None:
    (work / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process may have come in
        work.rmdir()


@contextlib.contextmanager
def locked(
    work: Path, output: Path, contents: Mapping[str, Callable[[int], bool]], lock_name: str = LOCK
) -> Iterator[None]:
    """Holds the lock inside `work`, which is made if need be.

    Args:
        work: the hidden folder.
        output: what is written in it.
        contents: what may be in it beside the lock: names or shell patterns, and of which kind each must be
            (`stat.S_ISREG`).
        lock_name: of the file that is locked.

    Raises:
        InputError: if it is not what a run of ours leaves, another process holds the lock, or the name of `output` is
            not UTF-8, which records and libraries that write could not name hours later.
    """
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{printable(output)}: expected an output with a name in UTF-8; choose another one."
        ) from None
    while True:
        with contextlib.suppress(FileExistsError):
            work.mkdir(mode=0o700)
        _check_ours(work, {**contents, lock_name: stat.S_ISREG})
        try:
            handle = os.open(work / lock_name, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except FileNotFoundError:  # its owner has just removed the folder
            continue
        with os.fdopen(handle, "r+b", buffering=0) as lock:
            if not _lock(lock.fileno()):
                owner = lock.read(20).decode("ascii", "replace")
                raise InputError(
                    f"{printable(output)} is being written by process {printable(owner) or 'unknown'}; wait for it, "
                    "or choose another output."
                )
            try:
                is_current = os.path.samestat(os.fstat(lock.fileno()), os.lstat(work / lock_name))
            except FileNotFoundError:
                is_current = False
            if not is_current:  # it was removed between our opening and locking it
                continue
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            yield
            return


def _check_ours(work: Path, contents: Mapping[str, Callable[[int], bool]]) -> None:
    """Refuses what we would not have made: links, other kinds of file, other owners, other content."""
    _check_kind(work, [stat.S_ISDIR], work)
    with contextlib.suppress(FileNotFoundError):  # removed by its owner just now
        for child in work.iterdir():
            kinds = [kind for pattern, kind in contents.items() if fnmatch.fnmatchcase(child.name, pattern)]
            _check_kind(child, kinds, work)


def _check_kind(path: Path, kinds: Sequence[Callable[[int], bool]], work: Path) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:  # removed by its owner just now
        return
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not is_own or not any(is_of_kind(status.st_mode) for is_of_kind in kinds):
        raise InputError(
            f"{printable(path)} is not what a run of this command leaves (it is a link, of another kind or owner, "
            f"or of another program); look at {printable(work)} and move it away."
        )


def _lock(handle: int) -> bool:
    """Whether the lock is ours now; on disks that know no locks it always is."""
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Turns the signals that ask a process to end into SystemExit, so that it tidies up; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # `nohup` has them ignored
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, handler)
