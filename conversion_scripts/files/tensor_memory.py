"""Memory for bytes that are read, written and dropped one after another: the same pages again and again.

Fresh pages must be cleared by the system first and, in a virtual machine, often fetched from its host: several times
what reading into pages that are there costs. That holds for tensors as for the system's page cache of files.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from math import prod

import numpy as np
import torch

ARENA = 512 * 2**20  # bytes of addresses; only what was used counts as memory
_SMALL = 2**20  # bytes up to which the allocator's own memory is as good
_PAGE = 4096


class _Arena:
    """One anonymous mapping, made at its first use; blocks of it are lent, each at the lowest free place."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory: mmap.mmap | None = None
        self._lent: list[tuple[int, int]] = []  # (start, end), sorted
        self._lock = threading.RLock()  # a collection of garbage inside `take` may give back

    def take(self, nbytes: int) -> np.ndarray | None:
        """A block as an array, at whose end it is given back; `None` if there is no room for it."""
        length = nbytes + -nbytes % _PAGE
        with self._lock:
            place = 0
            for start, end in [*self._lent, (self.size, 0)]:
                if place + length <= start:
                    break
                place = end
            else:
                return None
            if self._memory is None:
                try:
                    self._memory = _anonymous_memory(self.size)
                except OSError:  # a limit on addresses
                    self.size = 0
                    return None
            self._lent = sorted([*self._lent, (place, place + length)])
        array = np.frombuffer(self._memory, dtype=np.uint8, count=nbytes, offset=place)
        weakref.finalize(array, self._give_back, place).atexit = False
        return array

    def _give_back(self, place: int) -> None:
        with self._lock:
            self._lent = [block for block in self._lent if block[0] != place]


def _anonymous_memory(nbytes: int) -> mmap.mmap:
    flags = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, nbytes, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fresh memory costs half as much time then
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_arena: _Arena | None = None
_users = 0
_changing = threading.Lock()


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, tensors of `empty_tensor` take each other's memory; it goes back to the system at the end."""
    global _arena, _users
    with _changing:
        _arena = _arena or _Arena(ARENA)
        _users += 1
    try:
        yield
    finally:
        with _changing:
            _users -= 1
            if not _users:
                _arena = None


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor to be filled; from 1 MiB on, its memory goes to others, or back to the system, when it is dropped.

    The allocator would keep freed blocks of up to 32 MiB, for each thread of its own: peaks would grow with the
    checkpoint.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < _SMALL:
        return torch.empty(shape, dtype=dtype)
    arena = _arena
    array = arena.take(nbytes) if arena else None
    if array is None:
        array = np.frombuffer(_anonymous_memory(nbytes), dtype=np.uint8)
    return torch.from_numpy(array).view(dtype).reshape(shape)  # it and its views hold the array


def drop_from_page_cache(file: int, start: int = 0, length: int = 0) -> None:
    """Tells the system that bytes of an open file (0: all to its end) will not be read again soon, where it can.

    Bytes that are not on the disk yet stay. Other programs' files are not pushed out of the cache then, either.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a file system without
            os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


def give_memory_back() -> None:
    """Has glibc return every freed megabyte; by itself it keeps blocks of up to 32 MiB, and peaks would add up."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            m_mmap_threshold = -3
            ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)
