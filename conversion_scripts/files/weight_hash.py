"""SHA-256 of weights: of the bytes of tensors, whole or piece by piece."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, BinaryIO

import torch

BLOCK = 8 * 2**20  # bytes that are converted, hashed and written at once


class WeightHash:
    """The hash of a weight in `conversion.json`: SHA-256 of its bytes.

    With three and more axes it is the SHA-256 of the SHA-256s of the slices along the first axis, so that an expert
    that was hashed when it was read need not be hashed again as a part of the stacked tensor.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape = shape
        self.dtype = dtype
        self._slice = prod(shape[1:]) * dtype.itemsize if len(shape) > 2 else 0
        self._inner = hashlib.sha256()
        self._outer = hashlib.sha256()
        self._filled = 0
        self._whole = ""
        self.slices: list[str] = []  # of those that are finished

    def update(self, block: memoryview) -> None:
        """Adds the bytes that come next."""
        while self._slice and len(block) + self._filled >= self._slice:
            rest = self._slice - self._filled
            self._inner.update(block[:rest])
            self.slices.append(self._inner.hexdigest())
            self._outer.update(self._inner.digest())
            self._inner, self._filled, block = hashlib.sha256(), 0, block[rest:]
        self._inner.update(block)
        self._filled += len(block)

    def takes(self, piece: torch.Tensor) -> bool:
        """Whether the SHA-256 of this piece can be added: it is one slice, or all of a tensor with fewer axes."""
        return piece.dtype == self.dtype and piece.shape == (self.shape[1:] if self._slice else self.shape)

    def add(self, digest: str) -> None:
        """Adds the piece that comes next by its SHA-256."""
        assert self._filled == 0
        if self._slice:
            self.slices.append(digest)
            self._outer.update(bytes.fromhex(digest))
        else:
            self._whole = digest

    def hexdigest(self) -> str:
        return self._whole or (self._outer if self._slice else self._inner).hexdigest()


def weight_digest(shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[torch.Tensor]) -> str:
    """The `WeightHash` of a weight of this dtype, given in pieces along its first axis."""
    digest = WeightHash(tuple(shape), dtype)
    for piece in pieces:
        for block in blocks_of(piece, dtype):
            digest.update(block)
    return digest.hexdigest()


def hash_file(file: BinaryIO, nbytes: int, digest: WeightHash, progress: Callable[[int], Any]) -> None:
    """Adds the bytes that come next in a file."""
    for start in range(0, nbytes, BLOCK):
        block = file.read(min(BLOCK, nbytes - start))
        digest.update(memoryview(block))
        progress(len(block))


def tensor_digest(pieces: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes of a tensor, given in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(tensor_bytes(piece))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as bytes, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def blocks_of(piece: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in order, at most `BLOCK` at once (or one row), so that copies stay small."""
    if piece.dtype == dtype and piece.is_contiguous():
        values = tensor_bytes(piece)
        for start in range(0, len(values), BLOCK):
            yield values[start : start + BLOCK]
    elif piece.dim() < 2 or piece[0].numel() * dtype.itemsize <= BLOCK:
        rows = piece if piece.dim() else piece[None]
        step = max(BLOCK // max(rows[:1].numel() * dtype.itemsize, 1), 1)
        for start in range(0, len(rows), step):
            yield tensor_bytes(rows[start : start + step].to(dtype))
    else:
        for row in piece:
            yield from blocks_of(row, dtype)
