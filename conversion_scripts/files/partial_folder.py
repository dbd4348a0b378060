"""The hidden folder beside OUTPUT in which a conversion grows, so that it can be stopped anywhere and continued.

.OUTPUT.partial/
    lock            held by the conversion that is running; the system frees it when the process ends, however
    journal.jsonl   line 1: what is converted and how; then one line per finished weight file, with its hashes
    parts.jsonl     one line per finished tensor or slice of the weight file that is being written
    folder/         becomes OUTPUT by being renamed, when it is whole
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...support.errors import ConversionError, quoted, shortened, size_text

_LOCK, _JOURNAL, _PARTS, _FOLDER = "lock", "journal.jsonl", "parts.jsonl", "folder"
_RESERVE = 16 * 2**20  # configuration, tokenizer, code


@dataclass(frozen=True)
class FinishedFile:
    """A weight file that is on disk: SHA-256 of its tensors, and of the source tensors that were read for it.

    `unchecked` says of which sources the bytes were not compared with a checksum, and why.
    """

    file: str
    tensors: dict[str, str]
    sources: dict[str, str]
    unchecked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedPart:
    """A tensor (`index` is None), or a slice along its first axis, that was written into an unfinished weight file."""

    file: str
    tensor: str
    index: int | None
    sha256: str
    sources: dict[str, str]
    unchecked: dict[str, str] = field(default_factory=dict)


def partial_path(output: Path) -> Path:
    """Where the unfinished conversion into `output` lives."""
    return output.parent / f".{output.name}.partial"


class PartialFolder:
    """A folder that becomes `output` when `publish()` is called.

    If the block is left before that, by an error, Ctrl-C or SIGTERM, finished weight files stay for the next time, and
    what is finished of the one that was being written; but nothing stays if no file is finished (unless `keep_parts`),
    or if a `ConversionError` while writing says that the checkpoint is unusable.

    Args:
        output: The folder to be; its parents are made.
        identity: What decides the output's bytes: only a conversion with an equal one is continued.
        restart: Whether to discard an unfinished conversion, whatever it is.
        keep_parts: Whether the start of the first file is worth keeping, since it came over a network.

    Raises:
        ConversionError: if another process is converting into `output`, or an unfinished conversion is not this one.
    """

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False, keep_parts: bool = False):
        self.output = output
        self.path = partial_path(output)
        self.folder = self.path / _FOLDER
        self.identity = identity
        self.restart = restart
        self.keep_parts = keep_parts
        self.parts: list[FinishedPart] = []
        self.finished: dict[str, FinishedFile] = {}
        self.published = False
        self._writing = False
        self._lock: BinaryIO | None = None
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> "PartialFolder":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._check_ours()
        self._lock = _locked(self.path)
        self._signals.enter_context(terminate_as_exit())
        try:
            if self.restart:
                self._discard(keep_lock=True)
            self.finished = self._read_journal()
            self.parts = self._read_parts()
            self.published = self._is_published()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            unusable = isinstance(error, ConversionError) and self._writing
            if error is None or unusable or not (self.finished or (self.keep_parts and self.parts)):
                self._discard()
        finally:
            self._unlock()

    def begin(self, kept: dict[str, FinishedFile], parts: list[FinishedPart], needed_bytes: int) -> None:
        """Starts writing: all but what is kept is deleted, and `needed_bytes` more must fit on the disk."""
        self.finished, self.parts = dict(kept), list(parts)
        self.folder.mkdir(exist_ok=True)
        names = {*kept, *(part.file for part in parts)}
        for child in self.folder.iterdir():
            if child.name not in names:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        check_space(self.output.parent, needed_bytes)
        (self.path / _PARTS).write_text("".join(json.dumps(asdict(part)) + "\n" for part in parts), encoding="utf-8")
        lines = [self.identity, *(asdict(entry) for entry in kept.values())]
        fresh = self.path / f"{_JOURNAL}.new"
        with open(fresh, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / _JOURNAL)
        self._writing = True

    def record(self, entry: FinishedFile) -> None:
        """Notes that a weight file is on disk."""
        with open(self.path / _JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[entry.file] = entry
        (self.path / _PARTS).unlink(missing_ok=True)
        self.parts = []

    def record_part(self, part: FinishedPart) -> None:
        """Notes that a part of a weight file was written; that it reached the disk is for the next time to check."""
        with open(self.path / _PARTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(part)) + "\n")
        self.parts.append(part)

    def publish(self) -> None:
        """Makes the folder the output, which must still be free."""
        self._writing = False  # whatever stands in the way now, the weights are good
        for child in self.folder.iterdir():
            _sync(child)
        _sync(self.folder)
        check_output_is_free(self.output)
        if self.output.is_dir():
            self.output.rmdir()
        self.folder.rename(self.output)
        _sync(self.output.parent)
        self.published = True

    def _is_published(self) -> bool:
        """Whether an earlier run made the output and was killed before it could tidy up."""
        return bool(self.finished) and not self.folder.exists() and self.output.is_dir() and any(self.output.iterdir())

    def _check_ours(self) -> None:
        if not self.path.is_dir() or self.path.is_symlink():
            if self.path.exists() or self.path.is_symlink():
                raise ConversionError(f"{self.path} is in the way; the unfinished output is kept there: delete it")
            return
        strange = sorted(
            {child.name for child in self.path.iterdir()} - {_LOCK, _JOURNAL, f"{_JOURNAL}.new", _PARTS, _FOLDER}
        )
        if strange:
            raise ConversionError(f"{self.path} holds {quoted(strange)}, which no conversion wrote; move it away")

    def _read_journal(self) -> dict[str, FinishedFile]:
        """The entries of an earlier run of this conversion; what was not written to the end does not count."""
        try:
            lines = (self.path / _JOURNAL).read_bytes().split(b"\n")[:-1]
            found = [json.loads(line) for line in lines]
            identity = found[0]
            entries = [FinishedFile(**entry) for entry in found[1:]]
        except (FileNotFoundError, IndexError):
            return {}
        except (ValueError, TypeError) as error:
            raise ConversionError(
                f"{self.path / _JOURNAL} is not readable ({shortened(str(error))}); start again with --restart"
            ) from None
        expected = json.loads(json.dumps(self.identity))
        if identity != expected:
            known = identity if isinstance(identity, dict) else {}
            differing = [name for name in sorted({*known, *expected}) if known.get(name) != expected.get(name)]
            raise ConversionError(
                f"{self.path} holds an unfinished conversion of {shortened(known.get('source'))} that differs "
                f"from this one in {', '.join(differing)}; give its command again to continue it, or --restart "
                "to discard it"
            )
        return {entry.file: entry for entry in entries}

    def _read_parts(self) -> list[FinishedPart]:
        """The parts that an earlier run of this conversion noted; none if they cannot be read."""
        try:
            lines = (self.path / _PARTS).read_bytes().split(b"\n")[:-1]
            parts = [FinishedPart(**json.loads(line)) for line in lines]
        except (FileNotFoundError, ValueError, TypeError):
            return []
        return [part for part in parts if part.file == parts[-1].file and part.file not in self.finished]

    def _discard(self, keep_lock: bool = False) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in (_JOURNAL, f"{_JOURNAL}.new", _PARTS):
            (self.path / name).unlink(missing_ok=True)
        if not keep_lock:
            (self.path / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process may have come in after us
                self.path.rmdir()

    def _unlock(self) -> None:
        self._signals.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuses to start what cannot end."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _RESERVE:
        raise ConversionError(
            f"{folder} has {size_text(free)} free, the output needs {size_text(needed_bytes + _RESERVE)}; free some "
            "space or name another disk"
        )


@contextlib.contextmanager
def staged_folder(output: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` at the end, or vanishes on any error, interrupt or SIGTERM."""
    output.parent.mkdir(parents=True, exist_ok=True)
    check_space(output.parent, needed_bytes)
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    with terminate_as_exit():
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier process that had this number and was killed
            folder.mkdir()
            yield folder
            check_output_is_free(output)
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def check_output_is_free(output: Path) -> None:
    """Refuses to write over something."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        what = "is a folder that is not empty" if output.is_dir() else "is there already and not a folder"
        raise ConversionError(f"{output} {what}; name a new folder, or delete it first")


def leftover(output: Path) -> str:
    """What an unfinished conversion into `output` left, and what to do with it; empty if nothing."""
    path = partial_path(Path(os.path.abspath(output)))
    try:
        count = (path / _JOURNAL).read_bytes().count(b"\n") - 1
    except OSError:
        return ""
    started = (path / _PARTS).is_file() and (path / _PARTS).stat().st_size > 0
    if count < 1 and not started:
        return ""
    what = f"{count} finished weight file{'s' if count > 1 else ''}" if count > 0 else "the start of a weight file"
    return (
        f"{what} kept in {path}: the same command continues from "
        "there; --restart, or deleting that folder, discards them"
    )


def _locked(path: Path) -> BinaryIO:
    """An exclusive lock inside `path`, which is made if need be."""
    while True:
        path.mkdir(exist_ok=True)
        try:
            file = open(path / _LOCK, "a+b")
        except FileNotFoundError:  # its owner has just removed the folder
            continue
        try:
            _lock_file(file)
        except OSError:
            file.seek(0)
            owner = file.read(64).decode("ascii", "replace").strip()
            file.close()
            raise ConversionError(
                f"{path} is in use by process {owner or 'unknown'}, which converts into the same folder; wait for it"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (path / _LOCK).stat()):
                file.truncate(0)
                file.write(str(os.getpid()).encode("ascii"))
                file.flush()
                return file
        file.close()  # it was removed between our opening and locking it


def _lock_file(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(path: Path) -> None:
    """Brings a file or folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that it unwinds; signals can only be handled in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
