"""The hidden folder beside an output with the results of finished chunks, so that a run can be stopped anywhere.

.OUTPUT.chunks/
    record.json         what is computed and how; only a run with an equal record goes on from here
    lock-0              held by process 0 while it runs; the system frees it when the process ends, however
    start.json, here-1  how the processes of a run begin together: see `common_start.py`
    failed-1            why process 1 ended, for process 0, which waits for it
    00000012.arrow      result of chunk 12, there as a whole or not at all
    output/             where process 0 writes the output, before it gets its name
"""

import contextlib
import json
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...support.errors import InputError
from ...support.printable import printable
from ...support.whole_output import write_whole
from ...support.work_folder import locked
from .common_start import let_others_begin, wait_to_begin
from .processes import Share
from .record import differences

_RECORD = "record.json"
_POLL = 0.2  # seconds between two looks at what other processes finished
# What a run leaves; names that begin with a dot are files that are not whole yet.
_CONTENTS = {
    _RECORD: stat.S_ISREG,
    "lock-*": stat.S_ISREG,
    "start.json": stat.S_ISREG,
    "here-*": stat.S_ISREG,
    "failed-*": stat.S_ISREG,
    "*.arrow": stat.S_ISREG,
    ".*": stat.S_ISREG,
    "output": stat.S_ISDIR,
}


class FinishedChunks:
    """The results of a run's finished chunks, on disk.

    Args:
        output: the file or folder that they are for.
        record: of the run.
        process: this process among those that work on the same output; they begin together.
        restart: whether to discard what an earlier run left, whatever it is.

    Raises:
        InputError: if the folder holds results of another run, or anything that a run of ours does not leave, or
            another process of this number is working on the output, or process 0 on another one.
        TimeoutError: if not all processes begin.
    """

    def __init__(self, output: Path, record: Mapping[str, Any], process: Share, restart: bool = False):
        self.folder = output.parent / f".{output.name}.chunks"
        self._process = process
        output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.enter_context(locked(self.folder, output, _CONTENTS, f"lock-{process.index}"))
            if process.index == 0:
                self._prepare(record, restart)
                if process.count > 1:
                    let_others_begin(self.folder, process.count)
            else:
                wait_to_begin(self.folder, process.index)
                self._check_common(record)
            self._lock = opened.pop_all()

    def _prepare(self, record: Mapping[str, Any], restart: bool) -> None:
        """Leave in the folder what this run goes on from, and its record."""
        if any(self.folder.glob("*.arrow")):
            before = self._kept_record()
            changed = ["record"] if before is None else differences(before, record)
            if changed and not restart:
                raise InputError(
                    f"{printable(self.folder)} keeps the finished part of another run for the same output, which "
                    f"differs in {', '.join(changed[:8])}. Repeat that command to go on with it, or add --restart to "
                    "discard it."
                )
            if restart:
                self._discard()
        for path in self.folder.glob("failed-*"):
            path.unlink()
        with contextlib.suppress(FileNotFoundError):  # of a run that was killed while it wrote
            shutil.rmtree(self.folder / "output")
        write_whole(self.folder / _RECORD, json.dumps(record))

    def _kept_record(self) -> dict[str, Any] | None:
        """The record in the folder; None if there is none, or a damaged one."""
        found = None
        with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
            found = json.loads((self.folder / _RECORD).read_bytes())
        return found if isinstance(found, dict) else None

    def _discard(self) -> None:
        """Remove the chunks and then their record, so that no kill between leaves them without one."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _RECORD):
            if path.name != "output" and not path.name.startswith(("lock-", "here-", ".here-")):
                path.unlink()

    def _check_common(self, record: Mapping[str, Any]) -> None:
        """Refuse to work on another run than process 0 does, unless that has finished and removes the folder."""
        common = self._kept_record()
        changed = [] if common is None else differences(common, record)
        if changed:
            raise InputError(
                f"process {self._process.index} of this run differs from process 0 in {', '.join(changed[:8])}; give "
                "all of them the same options, files and versions."
            )

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.arrow"

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those chunks that have no result yet."""
        return [index for index in indices if not self._path(index).exists()]

    def save(self, index: int, result: pa.Table) -> None:
        """Keep the result of a chunk."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, result.schema) as writer:
            writer.write_table(result)
        write_whole(self._path(index), sink.getvalue().to_pybytes())

    def result(self, index: int) -> pa.Table:
        """The result of a finished chunk.

        Raises:
            ValueError: if it is damaged.
        """
        path = self._path(index)
        try:
            with pa.OSFile(str(path)) as file:
                return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid as error:
            path.unlink()
            raise InputError(
                f"{printable(path)} is damaged and was removed; repeat the command to compute it again."
            ) from error

    def results(self, indices: Iterable[int]) -> "Results":
        """The results of these chunks, one after the other, each time that they are asked for."""
        return Results(self, indices)

    def fail(self, error: BaseException) -> None:
        """Tell process 0 that this one ended."""
        write_whole(self.folder / f"failed-{self._process.index}", f"{type(error).__name__}: {error}")

    def wait_for(self, indices: Iterable[int]) -> Iterator[int]:
        """Wait until other processes have finished these chunks; yields how many came at each look.

        Raises:
            RuntimeError: if one of the processes ended with an error.
        """
        missing = self.missing(indices)
        while missing:
            for path in self.folder.glob("failed-*"):
                raise RuntimeError(f"process {path.name.partition('-')[2]} of this run ended: {path.read_text()}")
            time.sleep(_POLL)
            left = self.missing(missing)
            yield len(missing) - len(left)
            missing = left

    def close(self) -> None:
        """Let the next run work here."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder: the output is there, or there is nothing to go on with."""
        shutil.rmtree(self.folder)


class Results:
    """Results of finished chunks, read from the disk one by one in each loop over them."""

    def __init__(self, finished: FinishedChunks, indices: Iterable[int]):
        self._finished, self._indices = finished, list(indices)

    def __iter__(self) -> Iterator[pa.Table]:
        return map(self._finished.result, self._indices)
