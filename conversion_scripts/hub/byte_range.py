"""Random access to parts of files, on this machine or on the Hub, behind one kind of file object."""

import io
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...support.errors import ConversionError
from ..files.tensor_memory import drop_from_page_cache
from .hub_path import HubPath, SourcePath, size_of
from .repository import PARALLEL_PARTS, PART


@dataclass(frozen=True)
class Span:
    """The bytes `start .. start + length` of a file."""

    path: SourcePath
    start: int
    length: int


def bytes_by_file(spans: Iterable[Span]) -> dict[SourcePath, int]:
    """How many bytes of each file the spans cover; what several cover is counted once."""
    by_file: dict[SourcePath, list[tuple[int, int]]] = {}
    for span in spans:
        by_file.setdefault(span.path, []).append((span.start, span.start + span.length))
    totals = {}
    for path, pairs in by_file.items():
        total = reached = 0
        for start, end in sorted(pairs):
            total += max(end - max(start, reached), 0)
            reached = max(reached, end)
        totals[path] = total
    return totals


class ByteRange(io.RawIOBase):
    """The bytes `start .. start + length` of a file, as a file of their own.

    Raises:
        ConversionError: if the file does not have these bytes.
    """

    read_size = 2**20  # bytes that are best read at once: a processor cache holds them

    def __init__(self, path: SourcePath, size: int, start: int, length: int | None):
        self.path = path
        self.start = start
        self.length = size - start if length is None else length
        self._position = 0
        if start < 0 or self.length < 0 or start + self.length > size:
            self.close()
            raise ConversionError(
                f"{path}: bytes {start} to {start + self.length} are needed, but the file has {size}; it is truncated "
                "or does not belong to this checkpoint"
            )

    @abstractmethod
    def read_at(self, position: int, buffer: memoryview) -> int:
        """Reads from `start + position` into the buffer, which ends inside the range; returns how many bytes."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("negative seek position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self.length - self._position), 0)
        count = self.read_at(self._position, memoryview(buffer)[:wanted]) if wanted else 0
        self._position += count
        return count


class FileRange(ByteRange):
    """A range of a file on this machine.

    What was read leaves the page cache, since checkpoints are larger than it, unless `is_read_again` is set.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None):
        self.is_read_again = False
        self._file = open(path, "rb", buffering=0)
        super().__init__(path, self._file.seek(0, io.SEEK_END), start, length)

    def read_at(self, position: int, buffer: memoryview) -> int:
        self._file.seek(self.start + position)
        count = self._file.readinto(buffer) or 0
        if not self.is_read_again:
            drop_from_page_cache(self._file.fileno(), self.start + position, count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class HubRange(ByteRange):
    """A range of a file on the Hub; no byte outside it is fetched."""

    read_size = PART * PARALLEL_PARTS

    def __init__(self, path: HubPath, start: int = 0, length: int | None = None):
        super().__init__(path, size_of(path), start, length)
        self._hub = path

    def read_at(self, position: int, buffer: memoryview) -> int:
        limits = (self.start, self.start + self.length)
        return self._hub.repository.read_into(self._hub.key, self.start + position, buffer, limits)


def open_range(path: SourcePath, start: int = 0, length: int | None = None) -> ByteRange:
    """The bytes `start .. start + length` of a file (to its end by default), wherever it is."""
    if isinstance(path, HubPath):
        local = path.local_copy()
        return HubRange(path, start, length) if local is None else FileRange(local, start, length)
    return FileRange(path, start, length)
