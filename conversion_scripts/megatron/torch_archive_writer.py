"""Writes what `torch.load` reads, one tensor at a time: a zip file with one pickle and one entry per storage.

`torch.save` needs all tensors in memory. Here the pickle is made from names, shapes and dtypes (`LazyTensor`s stand
for tensors), and the values stream after it. Layout as PyTorch's `caffe2/serialize/inline_container.cc` writes it:
entries are stored plainly and begin at multiples of 64 bytes.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2

from ..files.weight_hash import tensor_bytes
from .safe_pickle import STORAGE_DTYPES
from .torch_archive import LazyTensor

ALIGNMENT = 64
_STORAGE_CLASSES = {dtype: getattr(torch, name) for name, dtype in STORAGE_DTYPES.items()}
_LARGE = 2**32 - 1  # from here on a zip file needs its 64-bit fields
_MANY = 2**16 - 1
_UTF8_NAMES = 0x800
_FIRST_DAY = 0x21  # 1980-01-01, so that the same tensors give the same bytes


def write_torch_archive(
    file: BinaryIO, value: Any, name: str = "archive", progress: Callable[[int], Any] = lambda count: None
) -> int:
    """Writes `value` at the file's position, as `torch.save` would; returns the number of bytes written.

    Args:
        file: A binary file; the archive may begin anywhere in it.
        value: Plain data with `LazyTensor`s for tensors; each is read when its turn comes, and dropped.
        name: The folder inside the archive, for `torch.save` the file's name without ending.
        progress: Called with the number of tensor bytes written since the last call.
    """
    buffer = io.BytesIO()
    pickler = _TensorPickler(buffer, protocol=2)
    pickler.dump(value)
    archive = _ZipWriter(file)
    archive.add(f"{name}/data.pkl", buffer.getvalue())
    archive.add(f"{name}/.format_version", b"1")
    archive.add(f"{name}/.storage_alignment", str(ALIGNMENT).encode())
    archive.add(f"{name}/byteorder", b"little")
    for key, lazy in enumerate(pickler.tensors):
        tensor = lazy.read()
        assert tensor.shape == lazy.shape and tensor.dtype == lazy.dtype, f"{tensor.shape} {tensor.dtype}, {lazy}"
        data = tensor_bytes(tensor)
        archive.add(f"{name}/data/{key}", data)
        progress(len(data))
        del tensor, data  # before the next one is read
    archive.add(f"{name}/version", b"3\n")
    return archive.finish()


@dataclass(frozen=True)
class _Storage:
    """The storage of a tensor that is not there yet."""

    key: str
    dtype: torch.dtype
    length: int


class _TensorPickler(pickle.Pickler):
    def __init__(self, file: BinaryIO, protocol: int):
        super().__init__(file, protocol)
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return NotImplemented
        stride = tuple(prod(value.shape[axis + 1 :]) or 1 for axis in range(len(value.shape)))
        storage = _Storage(str(len(self.tensors)), value.dtype, prod(value.shape))
        self.tensors.append(value)
        return _rebuild_tensor_v2, (storage, 0, value.shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", _STORAGE_CLASSES[value.dtype], value.key, "cpu", value.length)
        return None


class _ZipWriter:
    """A zip file of plainly stored entries, at any place of a file; `zipfile` can neither align nor start there."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.start = file.tell()
        self.position = 0
        self.directory: list[bytes] = []

    def add(self, name: str, data: bytes | memoryview) -> None:
        encoded, offset, size, checksum = name.encode(), self.position, len(data), zlib.crc32(data)
        large = size >= _LARGE
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        padding = -(offset + 30 + len(encoded) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + bytes(padding)
        sizes = (_LARGE, _LARGE) if large else (size, size)
        version = 45 if large else 20
        common = (_UTF8_NAMES, 0, 0, _FIRST_DAY, checksum, *sizes, len(encoded))
        self._write(struct.pack("<4s5H3I2H", b"PK\x03\x04", version, *common, len(extra)) + encoded + extra)
        self._write(data)

        far = offset >= _LARGE
        numbers = [size, size] * large + [offset] * far
        extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
        version = 45 if numbers else 20
        tail = (len(extra), 0, 0, 0, 0, _LARGE if far else offset)
        entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", version, version, *common, *tail)
        self.directory.append(entry + encoded + extra)

    def finish(self) -> int:
        start, count = self.position, len(self.directory)
        for entry in self.directory:
            self._write(entry)
        size = self.position - start
        if start >= _LARGE or count >= _MANY:
            end = self.position
            self._write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
            self._write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        counts = (min(count, _MANY), min(count, _MANY))
        self._write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *counts, size, min(start, _LARGE), 0))
        return self.position

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.position += len(data)
