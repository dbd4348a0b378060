"""Writes sharded safetensors piece by piece: sizes are known beforehand, so headers come first, values stream after.

At most one piece is in memory, which for stacked experts is one expert, and one block of it is converted at a time.
The same tensors give the same bytes.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...support.errors import ConversionError
from .dtypes import SAFETENSORS_NAMES
from .tensor_memory import drop_from_page_cache
from .weight_hash import WeightHash, blocks_of, hash_file

SYNC_EVERY = 128 * 2**20
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

OnPart = Callable[[str, str, int | None, str], Any]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def slice_bytes(self) -> int:
        """Bytes of a slice along the first axis, as `WeightHash` has it: all of a tensor with less than three axes."""
        return (prod(self.shape[1:]) if len(self.shape) > 2 else prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class HashedTensor:
    """A tensor and a function that waits for the SHA-256 of its bytes."""

    values: torch.Tensor
    digest: Callable[[], str]


@dataclass
class StartedFile:
    """What is right in a weight file that was not finished: its first tensors, and slices of the one after these.

    Args:
        tensors: `WeightHash` of each tensor, in the file's order.
        slices: SHA-256 of the slices of the next one, along its first axis.
        nbytes: Size of all of them.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    slices: list[str] = field(default_factory=list)
    nbytes: int = 0


def shard_size(text: str | int) -> int:
    """Bytes of a size such as `"5GB"` or `"512MiB"`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()] if match[2] else float(match[1])) if match else 0
    if size < 1:
        raise ConversionError(f"max_shard_size must be a size such as '5GB' or '512MiB', got {text!r}")
    return size


def plan_shards(tensors: Sequence[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Tensors by name, grouped so that each file stays below the limit if its tensors allow.

    `save_pretrained` does the same, so the files are those of the model that saves itself.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as Transformers expects them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def write_safetensors(
    folder: Path,
    tensors: Sequence[TensorSpec],
    pieces: Callable[[TensorSpec, int], Iterable[torch.Tensor | HashedTensor]],
    max_shard_size: int,
    progress: Callable[[int], Any] = lambda count: None,
    finished: Mapping[str, Mapping[str, str]] | None = None,
    started: Mapping[str, StartedFile] | None = None,
    on_shard: Callable[[str, dict[str, str]], Any] = lambda name, digests: None,
    on_part: OnPart = lambda name, tensor, index, digest: None,
) -> dict[str, str]:
    """Writes the tensors, and an index if there are several files; returns the hash of each (`WeightHash`).

    Args:
        folder: Where to write; exists.
        tensors: What to write.
        pieces: A tensor's values as tensors that follow each other along the first axis, without the first so many
            slices; rounded to its dtype here.
        max_shard_size: Bytes after which a new file begins.
        progress: Called with the number of bytes written since the last call.
        finished: Files that are there and right, with the digests of their tensors; they are left alone.
        started: What is right in files that were cut off; they are continued from there.
        on_shard: Called when a file is on disk, with its name and the digests of its tensors.
        on_part: Called when a tensor, or a slice that came as a piece of its own, is handed to the system: with the
            file's name, the tensor's, the slice's index (`None`: all of it), and the digest.
    """
    shards = plan_shards(tensors, max_shard_size)
    names = shard_names(len(shards))
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(2, thread_name_prefix="hash") as pool:
        for name, shard in zip(names, shards, strict=True):
            if finished and name in finished:
                digests.update(finished[name])
                continue
            start = (started or {}).get(name, StartedFile())
            written = _write_shard(folder / name, shard, start, pieces, progress, pool, on_part)
            on_shard(name, written)
            digests.update(written)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(prod(tensor.shape) for tensor in tensors),
                "total_size": sum(tensor.nbytes for tensor in tensors),
            },
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return digests


def _write_shard(
    path: Path,
    shard: Sequence[TensorSpec],
    start: StartedFile,
    pieces: Callable[[TensorSpec, int], Iterable[torch.Tensor | HashedTensor]],
    progress: Callable[[int], Any],
    pool: ThreadPoolExecutor,
    on_part: OnPart,
) -> dict[str, str]:
    digests = dict(start.tensors)
    header = shard_header(shard)
    with open(path, "r+b" if start.nbytes else "wb") as file:
        if start.nbytes:
            file.truncate(len(header) + start.nbytes)
            file.seek(0, os.SEEK_END)
        else:
            file.write(header)
        unsynced = 0
        syncing: Future[Any] = pool.submit(int)
        for number, tensor in enumerate(shard[len(digests) :]):
            hashing = WeightHash(tensor.shape, tensor.dtype)
            for digest in start.slices if number == 0 else ():
                hashing.add(digest)
            first = len(hashing.slices)
            written = first * tensor.slice_bytes
            for index, piece in enumerate(pieces(tensor, first), first):
                known = piece.digest if isinstance(piece, HashedTensor) and hashing.takes(piece.values) else None
                values = piece.values if isinstance(piece, HashedTensor) else piece
                for block in blocks_of(values, tensor.dtype):
                    # Beside the writing; both release the GIL.
                    hashed = None if known else pool.submit(hashing.update, block)
                    file.write(block)
                    if hashed is not None:
                        hashed.result()
                    written += len(block)
                    unsynced += len(block)
                    progress(len(block))
                    del block
                    if unsynced >= SYNC_EVERY and syncing.done():  # the disk works while the next bytes are read
                        syncing = pool.submit(_to_disk, file.fileno())
                        unsynced = 0
                if known is not None:
                    hashing.add(known())
                del piece, values, known  # or it would be held while the next one is fetched
                if len(hashing.slices) == index + 1 and written == (index + 1) * tensor.slice_bytes:
                    file.flush()
                    on_part(path.name, tensor.name, index, hashing.slices[index])
            assert written == tensor.nbytes, f"{tensor.name}: wrote {written} bytes of {tensor.nbytes}"
            digests[tensor.name] = hashing.hexdigest()
            file.flush()
            on_part(path.name, tensor.name, None, digests[tensor.name])
        file.flush()
        syncing.result()
        os.fsync(file.fileno())
    return digests


def _to_disk(file: int) -> None:
    getattr(os, "fdatasync", os.fsync)(file)  # macOS has no fdatasync
    drop_from_page_cache(file)


def intact_start(
    path: Path,
    shard: Sequence[TensorSpec],
    tensors: Mapping[str, str],
    slices: Mapping[str, Sequence[str]],
    progress: Callable[[int], Any] = lambda count: None,
) -> StartedFile:
    """How far a file that was cut off is right, by the digests of its finished tensors and slices."""
    start = StartedFile()
    header = shard_header(shard)
    if not path.is_file():
        return start
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return start
        for tensor in shard:
            digest = WeightHash(tensor.shape, tensor.dtype)
            whole = tensor.name in tensors
            for _ in range(tensor.nbytes // tensor.slice_bytes if whole else len(slices.get(tensor.name, ()))):
                hash_file(file, tensor.slice_bytes, digest, progress)
            if whole and digest.hexdigest() == tensors[tensor.name]:
                start.tensors[tensor.name] = tensors[tensor.name]
                start.nbytes += tensor.nbytes
                continue
            for found, expected in zip(digest.slices, () if whole else slices.get(tensor.name, ()), strict=False):
                if found != expected:
                    break
                start.slices.append(expected)
            start.nbytes += len(start.slices) * tensor.slice_bytes
            break
    return start


def shard_is_intact(
    path: Path,
    shard: Sequence[TensorSpec],
    digests: Mapping[str, str],
    progress: Callable[[int], Any] = lambda count: None,
) -> bool:
    """Whether a file holds exactly these tensors with these SHA-256 digests; every byte is looked at."""
    header = shard_header(shard)
    if {tensor.name for tensor in shard} != set(digests) or not path.is_file():
        return False
    if path.stat().st_size != len(header) + sum(tensor.nbytes for tensor in shard):
        return False
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return False
        for tensor in shard:
            digest = WeightHash(tensor.shape, tensor.dtype)
            hash_file(file, tensor.nbytes, digest, progress)
            if digest.hexdigest() != digests[tensor.name]:
                return False
    return True


def shard_header(tensors: Sequence[TensorSpec]) -> bytes:
    """Length of the JSON header, then the header, padded so that values start at a multiple of 8."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
