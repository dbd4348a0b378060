"""The hidden folder beside OUTPUT in which a conversion grows, so that it can be stopped anywhere and continued.

.OUTPUT.partial/
    lock            held by the conversion that is running; the system frees it when the process ends, however
    journal.jsonl   line 1: what is converted and how; then one line per finished weight file, with its hashes
    parts.jsonl     one line per finished tensor or slice of the weight file that is being written
    folder/         becomes OUTPUT by being renamed, when it is whole

Nothing in it is believed to be ours by its name: links, other kinds of file and files of others are refused.
"""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...support.errors import DISK_IS_FULL, ConversionError, plain_words, shortened, size_text
from ...support.printable import printable
from ...support.whole_output import check_output_is_free
from ...support.work_folder import LOCK, locked, terminate_as_exit, work_path
from .file_facts import facts_of

_JOURNAL, _NEW_JOURNAL, _PARTS, _FOLDER = "journal.jsonl", "journal.jsonl.new", "parts.jsonl", "folder"
_CONTENTS = {_FOLDER: stat.S_ISDIR, _JOURNAL: stat.S_ISREG, _NEW_JOURNAL: stat.S_ISREG, _PARTS: stat.S_ISREG}
_RESERVE = 16 * 2**20  # configuration, tokenizer, code
_MOST_NOTES = 2**28  # bytes of a journal that are read
_WHOLE = "."  # stands in the journal for all files of the folder
_OUTPUT = ".."  # stands there for the folder when it is about to be renamed, with what the system says of its files


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


class PartialFolder:
    """A folder that becomes `output` when `publish()` is called.

    If the block is left before that, by an error, Ctrl-C or SIGTERM, finished weight files stay for the next time, and
    what is finished of the one that was being written; but nothing stays if no file is finished (unless `keep_parts`),
    or if a `ConversionError` while writing says that the checkpoint is unusable. The error says in a note what stays.

    Args:
        output: The folder to be; its parents are made.
        identity: What decides the output's bytes: only a conversion with an equal one is continued.
        restart: Whether to discard an unfinished conversion, whatever it is.
        keep_parts: Whether the start of the first file is worth keeping, since it came over a network.

    Raises:
        FileExistsError: if `output` is there, and is not an empty folder.
        InputError: if another process is converting into `output`, or something else is in the hidden folder's place.
        ConversionError: if an unfinished conversion is not this one.
    """

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False, keep_parts: bool = False):
        self.output = output
        self.path = work_path(output)
        self.folder = self.path / _FOLDER
        self.identity = identity
        self.restart = restart
        self.keep_parts = keep_parts
        self.parts: list[FinishedPart] = []
        self.finished: dict[str, FinishedFile] = {}
        self.published = False
        self._writing = False
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "PartialFolder":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(terminate_as_exit())
            held.enter_context(locked(self.path, self.output, _CONTENTS))
            try:
                self._look_inside()
            except BaseException:
                if not any(os.path.lexists(self.path / name) for name in _CONTENTS):
                    self._remove_lock()
                raise
            self._held = held.pop_all()
        return self

    def _look_inside(self) -> None:
        if self.restart:
            self._discard()
        self._check_files()
        self.finished = self._read_journal()
        self.parts = self._read_parts()
        self.published = self._is_published()
        if not self.published:
            check_output_is_free(self.output)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:  # libraries do not say what was being written
            words = plain_words(OSError(error.errno, ""))
            named = OSError(f"{printable(self.output)} was not written: {words}")
            self._tidy_up(named)
            raise named from error
        self._tidy_up(error)

    def _tidy_up(self, error: BaseException | None) -> None:
        """Discards what is of no use any more; of the rest, the error says that it is kept."""
        try:
            unusable = isinstance(error, ConversionError) and self._writing
            if error is None or unusable or not (self.finished or (self.keep_parts and self.parts)):
                self._discard()
                self._remove_lock()
            else:
                error.__notes__ = [*getattr(error, "__notes__", ()), self._kept()]  # Python 3.10 lacks `add_note`
        finally:
            self._held.close()

    def begin(self, kept: dict[str, FinishedFile], parts: list[FinishedPart], needed_bytes: int) -> None:
        """Starts writing: all but what is kept is deleted, and `needed_bytes` more must fit on the disk."""
        self.finished, self.parts = dict(kept), list(parts)
        self.folder.mkdir(exist_ok=True)
        names = {*kept, *(part.file for part in parts)}
        for child in self.folder.iterdir():
            if child.name not in names:
                _remove(child)
        check_space(self.output.parent, needed_bytes)
        self._write(_PARTS, parts)
        self._write(_NEW_JOURNAL, [self.identity, *kept.values()])
        (self.path / _NEW_JOURNAL).replace(self.path / _JOURNAL)
        self._writing = True

    def record(self, entry: FinishedFile) -> None:
        """Notes that a weight file is on disk."""
        self._write(_JOURNAL, [entry], flags=os.O_APPEND)
        self.finished[entry.file] = entry
        (self.path / _PARTS).unlink(missing_ok=True)
        self.parts = []

    def record_whole(self) -> None:
        """Notes that the folder is whole, and on disk."""
        for path in sorted(self.folder.rglob("*")):
            _sync(path)
        self.record(FinishedFile(_WHOLE, {}, {}))

    @property
    def is_whole(self) -> bool:
        """Whether an earlier run wrote the folder to the end."""
        return _WHOLE in self.finished and self.folder.is_dir()

    def record_part(self, part: FinishedPart) -> None:
        """Notes that a part of a weight file was written; that it reached the disk is for the next time to check."""
        self._write(_PARTS, [part], flags=os.O_APPEND, to_disk=False)
        self.parts.append(part)

    def publish(self) -> None:
        """Makes the folder the output, which must still be free."""
        self._writing = False  # whatever stands in the way now, the weights are good
        for path in sorted(self.folder.rglob("*")):
            _sync(path)
        _sync(self.folder)
        check_output_is_free(self.output)
        if self.output.is_dir():
            self.output.rmdir()
        self.record(FinishedFile(_OUTPUT, _files_in(self.folder), {}))
        self.folder.rename(self.output)
        _sync(self.output.parent)
        self.published = True

    def _is_published(self) -> bool:
        """Whether an earlier run made the output and was killed before it could tidy up."""
        noted = self.finished.get(_OUTPUT)
        is_there = self.output.is_dir() and not self.output.is_symlink() and not self.folder.exists()
        return noted is not None and is_there and _files_in(self.output) == noted.tensors

    def _check_files(self) -> None:
        """Refuses to continue in files that a conversion would not have left in the folder."""
        if not self.folder.exists():
            return
        for path in self.folder.rglob("*"):
            found = os.lstat(path)
            is_own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
            if not is_own or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise ConversionError(
                    f"{printable(path)} is a link, of another kind, or of another owner, which no conversion left; "
                    f"look at {printable(self.path)} and move it away"
                )

    def _read_journal(self) -> dict[str, FinishedFile]:
        """The entries of an earlier run of this conversion; what was not written to the end does not count."""
        try:
            lines = self._read_lines(_JOURNAL)
            identity = lines[0] if lines else None
            entries = [_finished_file(line) for line in lines[1:]]
        except (ValueError, TypeError, RecursionError) as error:
            raise ConversionError(
                f"{printable(self.path / _JOURNAL)} is not readable ({shortened(str(error))}); start again with "
                "--restart"
            ) from None
        if not lines:
            return {}
        expected = json.loads(json.dumps(self.identity))
        if identity != expected:
            known = identity if isinstance(identity, dict) else {}
            differing = [name for name in sorted({*known, *expected}) if known.get(name) != expected.get(name)]
            raise ConversionError(
                f"{printable(self.path)} holds an unfinished conversion of {shortened(known.get('source'))} that "
                f"differs from this one in {', '.join(map(printable, differing))}; give its command again to continue "
                "it, or --restart to discard it"
            )
        return {entry.file: entry for entry in entries}

    def _read_parts(self) -> list[FinishedPart]:
        """The parts that an earlier run of this conversion noted; none if they cannot be read."""
        try:
            parts = [_finished_part(line) for line in self._read_lines(_PARTS)]
        except (ValueError, TypeError, RecursionError):
            return []
        return [part for part in parts if part.file == parts[-1].file and part.file not in self.finished]

    def _read_lines(self, name: str) -> list[Any]:
        """The lines of a journal, but for one that was not written to the end."""
        try:
            with open(self.path / name, "rb", opener=_not_through_links) as file:
                content = file.read(_MOST_NOTES)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in content.split(b"\n")[:-1]]

    def _write(self, name: str, lines: Iterable[Any], flags: int = os.O_TRUNC, to_disk: bool = True) -> None:
        handle = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | flags | _NO_LINKS, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line if isinstance(line, dict) else asdict(line)) + "\n")
            file.flush()
            if to_disk:
                os.fsync(file.fileno())

    def _kept(self) -> str:
        """What stays of this conversion, and what to do with it."""
        count = len(self.finished.keys() - {_WHOLE, _OUTPUT})
        what = f"{count} finished weight file{'s' if count > 1 else ''}" if count else "the start of a weight file"
        what = "the whole output is" if _WHOLE in self.finished else what
        return (
            f"{what} kept in {printable(self.path)}: the same command continues from there; --restart, or deleting "
            "that folder, discards what is there"
        )

    def _discard(self) -> None:
        for name in (_PARTS, _NEW_JOURNAL, _JOURNAL):  # what says of files that they are finished goes before them
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_lock(self) -> None:
        (self.path / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process may have come in after us
            self.path.rmdir()


def _files_in(folder: Path) -> dict[str, str]:
    """What the system says of each file in a folder, which stays the same when the folder is renamed."""
    facts = {path.relative_to(folder).as_posix(): facts_of(path) for path in sorted(folder.rglob("*"))}
    return {name: " ".join(map(str, found)) for name, found in facts.items() if found is not None}


def _finished_file(fields: Any) -> FinishedFile:
    """A line of the journal; `TypeError` if it is none."""
    note = FinishedFile(**fields)
    _check_kinds([note.file], [note.tensors, note.sources, note.unchecked])
    return note


def _finished_part(fields: Any) -> FinishedPart:
    """A line of the parts; `TypeError` if it is none."""
    note = FinishedPart(**fields)
    _check_kinds([note.file, note.tensor, note.sha256], [note.sources, note.unchecked])
    if note.index is not None and type(note.index) is not int:
        raise TypeError(f"an index is {shortened(note.index)}")
    return note


def _check_kinds(texts: list[Any], tables: list[Any]) -> None:
    for table in tables:
        if not isinstance(table, dict):
            raise TypeError(f"expected names with hashes, got {shortened(table)}")
        texts = [*texts, *table.values()]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"expected text, got {shortened(text)}")


_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_LINKS)


def _remove(path: Path) -> None:
    """Deletes a file, a link itself, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuses to start what cannot end."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _RESERVE:
        raise ConversionError(
            f"{folder} has {size_text(free)} free, the output needs {size_text(needed_bytes + _RESERVE)}; free some "
            "space or name another disk"
        )


def _sync(path: Path) -> None:
    """Brings a file or folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
