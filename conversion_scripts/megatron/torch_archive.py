"""Reads what `torch.save` wrote, without PyTorch's unpickler: a zip file with one pickle and one entry per storage."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch

from ...support.errors import ConversionError, shortened
from ...support.lfs_pointer import POINTER_BYTES, refuse_lfs_pointer
from ...support.printable import printable
from ..files.tensor_memory import empty_tensor
from ..hub.byte_range import ByteRange, FileRange, HubRange, Span, open_range
from ..hub.hub_path import SourcePath
from .safe_pickle import (
    MAX_PICKLE_BYTES,
    STORAGE_DTYPES,
    ForeignName,
    StorageReference,
    TensorReference,
    load_pickle,
)

MAX_DIRECTORY_BYTES = 64 * 2**20
# Why bytes are not compared with a checksum.
NO_CHECKSUM = "their file was written without checksums"
ONLY_PARTS = "they are parts of larger pieces on the Hub, whose checksums are those of the whole pieces"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class _Directory(io.BufferedReader):
    """An archive as `zipfile` reads it, which would ask for as many bytes as a directory claims to have."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory would have {size} bytes, at most {MAX_DIRECTORY_BYTES} are read")
        return super().read(size)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when it is needed.

    `read()` returns a contiguous tensor on the CPU and raises `ConversionError` if the bytes are not there or do not
    have their checksums; `spans` are where they lie, as far as that is known without looking. Where bytes could not
    be compared with a checksum, `read()` adds the reason to `unchecked`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    spans: tuple[Span, ...] = ()
    unchecked: list[str] = field(default_factory=list, compare=False)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def files(self) -> tuple[SourcePath, ...]:
        return tuple(dict.fromkeys(span.path for span in self.spans))


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a tensor that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return torch.empty_strided(shape, stride, device="meta").is_contiguous()


class TorchArchive:
    """One `torch.save` archive, at a byte range of a file; opening reads the zip directory only.

    Args:
        path: The file.
        start: First byte of the archive (`torch_dist` files hold many archives one after another).
        length: Its length in bytes; `None` is the rest of the file.
        checked: Where storages begin in the file that have their checksums. Several readers of one archive share it,
            since a storage that is read in parts is looked at as a whole before the first of them.

    Raises:
        ConversionError: if the archive is truncated, compressed, encrypted, or not one.
    """

    def __init__(self, path: SourcePath, start: int = 0, length: int | None = None, checked: set[int] | None = None):
        self.path = path
        self.start = start
        self._checked = set() if checked is None else checked
        with open_range(path, start, length) as file:
            self.length = file.length
            magic = file.read(8) or b""
            if magic[:4] != b"PK\x03\x04":
                file.seek(0)
                refuse_lfs_pointer(file.read(POINTER_BYTES) or b"", printable(str(path)), ConversionError)
                raise ConversionError(
                    f"{path}: expected a zip archive as torch.save writes it since PyTorch 1.6, got a file that "
                    f"starts with {magic!r}; load and save it again with a recent PyTorch, or fetch it again"
                )
            try:
                with zipfile.ZipFile(_Directory(file)) as archive:
                    entries = archive.infolist()
                    directory = archive.start_dir
            except (
                zipfile.BadZipFile,
                ValueError,
                OSError,
                struct.error,
                EOFError,
                OverflowError,
                NotImplementedError,
            ) as error:
                raise ConversionError(
                    f"{path}: the zip archive cannot be read ({error}); the file is truncated or damaged"
                ) from None
        starts = sorted({*(entry.header_offset for entry in entries), directory})
        self._ends = dict(pairwise(starts))
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            if entry.filename in self._entries:
                raise ConversionError(f"{path}: the zip archive has two entries {shortened(entry.filename)}")
            self._entries[entry.filename] = entry
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConversionError(
                f"{path}: expected a torch.save archive with one data.pkl, found {len(pickles)}; the file is damaged "
                "or of another kind"
            )
        self._prefix = pickles[0][: -len("data.pkl")]

    def load(self) -> Any:
        """The saved object, with `TensorReference`s for tensors and `ForeignObject`s for foreign classes."""
        order = f"{self._prefix}byteorder"
        if order in self._entries and self._read_entry(order, 16) != b"little":
            raise ConversionError(f"{self.path}: only little-endian archives are supported")
        data = self._read_entry(f"{self._prefix}data.pkl", MAX_PICKLE_BYTES)
        return load_pickle(data, str(self.path), self._storage)

    def lazy(self, reference: TensorReference) -> LazyTensor:
        """The tensor behind a reference of `load()`."""
        unchecked: list[str] = []
        read = partial(self.read, reference, unchecked=unchecked)
        return LazyTensor(reference.shape, reference.dtype, read, (self._span(reference),), unchecked)

    def _span(self, reference: TensorReference) -> Span:
        """Where a tensor lies; its place inside an entry that it shares with others is not looked up."""
        entry = self._entries[reference.storage.place[0]]
        itemsize = reference.storage.dtype.itemsize
        start, length = entry.header_offset, self._end(entry) - entry.header_offset
        if prod(reference.shape) < reference.storage.length:
            start += reference.offset * itemsize
            length = min(_extent(reference.shape, reference.stride) * itemsize, length)
        return Span(self.path, self.start + start, length)

    def read(
        self,
        reference: TensorReference,
        index: tuple[int, ...] = (),
        out: torch.Tensor | None = None,
        unchecked: list[str] | None = None,
    ) -> torch.Tensor:
        """The tensor, or its part at `index` along the leading axes; only the bytes needed are read.

        Args:
            out: A contiguous tensor of the same shape and dtype to be filled and returned.
            unchecked: Takes the reason if the bytes cannot be compared with a checksum.
        """
        steps = zip(index, reference.stride[: len(index)], strict=True)
        offset = reference.offset + sum(i * step for i, step in steps)
        shape, stride = reference.shape[len(index) :], reference.stride[len(index) :]
        if 0 in shape:
            return torch.empty(shape, dtype=reference.dtype)
        extent = _extent(shape, stride)
        storage = reference.storage
        itemsize = storage.dtype.itemsize
        direct = out is not None and extent == prod(shape) and _is_contiguous(shape, stride)
        flat = out.reshape(-1) if direct and out is not None else empty_tensor((extent,), storage.dtype)
        reason = self._read_storage(storage, offset * itemsize, flat.view(torch.uint8).numpy().data)
        if reason and unchecked is not None:
            unchecked.append(reason)
        if direct and out is not None:
            return out
        tensor = torch.as_strided(flat, shape, stride).contiguous()
        return tensor if out is None else out.copy_(tensor)

    def _read_storage(self, storage: StorageReference, start: int, buffer: memoryview) -> str:
        """Fills the buffer from a storage; why the bytes were not compared with its checksum, or nothing."""
        name, checksum = storage.place
        is_whole = len(buffer) == storage.length * storage.dtype.itemsize
        with self._opened(name) as file:
            is_local = not isinstance(file, HubRange)
            if checksum and not is_whole and is_local:
                self._check_storage(storage)
            file.seek(start, io.SEEK_CUR)
            found = self._fill(file, buffer, bool(checksum) and is_whole)
        if is_whole:
            self._compare(found, checksum, f"storage {storage.key!r}")
        if not checksum:
            return NO_CHECKSUM
        return "" if is_whole or is_local else ONLY_PARTS

    def _check_storage(self, storage: StorageReference) -> None:
        """Once for a storage that is read in parts: all of it has the checksum of the archive."""
        name, checksum = storage.place
        place = self.start + self._entries[name].header_offset
        if place in self._checked:
            return
        buffer, left, found = memoryview(bytearray(2**20)), storage.length * storage.dtype.itemsize, 0
        with self._opened(name) as file:
            if isinstance(file, FileRange):
                file.is_read_again = True
            while left:
                block = buffer[: min(left, len(buffer))]
                self._fill(file, block)
                found = zlib.crc32(block, found)
                left -= len(block)
        self._compare(found, checksum, f"storage {storage.key!r}")
        self._checked.add(place)

    def _fill(self, file: ByteRange, buffer: memoryview, hashed: bool = False) -> int:
        """Fills the buffer from where the file stands; the checksum of what was read, if that is asked for."""
        filled = found = 0
        while filled < len(buffer):
            count = file.readinto(buffer[filled : filled + file.read_size])
            if not count:
                raise ConversionError(f"{self.path}: the file ended while it was read; it is truncated")
            if hashed:  # block by block, while it is in the processor's cache
                found = zlib.crc32(buffer[filled : filled + count], found)
            filled += count
        return found

    def _storage(self, identifier: Any) -> StorageReference:
        if type(identifier) is not tuple or len(identifier) != 5 or identifier[0] != "storage":
            raise ConversionError(f"expected the id of a storage, got {shortened(identifier)}")
        _, kind, key, _, length = identifier
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, ForeignName) and kind.module == "torch" else None
        if dtype is None:
            raise ConversionError(f"storages of kind {shortened(kind)} are not supported")
        name = f"{self._prefix}data/{key}"
        if not isinstance(key, str) or name not in self._entries:
            raise ConversionError(f"the archive has no storage {shortened(key)}; it is truncated or damaged")
        size = self._plain_entry(name).file_size
        if type(length) is not int or size != length * dtype.itemsize:
            raise ConversionError(
                f"storage {key!r} must have {shortened(length)} elements of {dtype}, but its entry has {size} bytes"
            )
        return StorageReference(key, dtype, length, (name, self._entries[name].CRC))

    def _opened(self, name: str) -> ByteRange:
        """An entry, its own header included, as a file that stands at the first byte of the data."""
        try:
            entry = self._plain_entry(name)
        except ConversionError as error:
            raise ConversionError(f"{self.path}: {error}") from None
        file = open_range(self.path, self.start + entry.header_offset, self._end(entry) - entry.header_offset)
        header = file.read(_LOCAL_HEADER.size) or b""
        problem = ""
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            problem = "is not where the zip archive's directory says"
        else:
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            file.seek(_LOCAL_HEADER.size + name_length + extra_length)
            if file.tell() + entry.file_size > file.length:
                problem = "reaches beyond its place in the zip archive; it is truncated or damaged"
        if problem:
            file.close()
            raise ConversionError(f"{self.path}: entry {shortened(name)} {problem}")
        return file

    def _end(self, entry: zipfile.ZipInfo) -> int:
        """Where the next entry, or the directory, begins."""
        return self._ends.get(entry.header_offset, self.length)

    def _plain_entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise ConversionError(
                f"entry {shortened(name)} is compressed or encrypted; torch.save stores entries plainly"
            )
        if not 0 <= entry.header_offset <= self.length - entry.file_size:
            raise ConversionError(f"entry {shortened(name)} of the zip archive is not where its directory says")
        return entry

    def _read_entry(self, name: str, limit: int) -> bytes:
        size = self._entries[name].file_size
        if size > limit:
            raise ConversionError(f"{self.path}: entry {shortened(name)} has {size} bytes, at most {limit} are read")
        with self._opened(name) as file:
            data = io.BufferedReader(file).read(size)
        self._check(data, self._entries[name].CRC, f"entry {shortened(name)}")
        return data

    def _check(self, data: bytes | memoryview, checksum: int, what: str) -> None:
        self._compare(zlib.crc32(data), checksum, what)

    def _compare(self, found: int, checksum: int, what: str) -> None:
        # Zero: written with torch.serialization.set_crc32_options(False).
        if checksum and found != checksum:
            raise ConversionError(
                f"{self.path}: the bytes of {what} do not have the checksum of the archive; the file is damaged: "
                "fetch it again"
            )
