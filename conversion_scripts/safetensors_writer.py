"""Writes sharded safetensors piece by piece: sizes are known beforehand, so headers come first, values stream after.

At most one piece is in memory, which for stacked experts is one expert. The same tensors give the same bytes.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


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
    pieces: Callable[[TensorSpec], Iterable[torch.Tensor]],
    max_shard_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, str]:
    """Writes the tensors, and an index if there are several files; returns the SHA-256 of each tensor's bytes.

    Args:
        folder: Where to write; exists.
        tensors: What to write.
        pieces: A tensor's values as tensors of its dtype that follow each other along the first axis.
        max_shard_size: Bytes after which a new file begins.
        progress: Called with the number of bytes written since the last call.
    """
    shards = plan_shards(tensors, max_shard_size)
    names = shard_names(len(shards))
    digests: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                digest = hashlib.sha256()
                written = 0
                for piece in _buffers(pieces(tensor), tensor.dtype):
                    file.write(piece)
                    digest.update(piece)
                    written += len(piece)
                    progress(len(piece))
                assert written == tensor.nbytes, f"{tensor.name}: wrote {written} bytes of {tensor.nbytes}"
                digests[tensor.name] = digest.hexdigest()
            file.flush()
            os.fsync(file.fileno())
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


def tensor_digest(pieces: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes of a tensor, given in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(tensor_bytes(piece))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as bytes, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _buffers(pieces: Iterable[torch.Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    for piece in pieces:
        assert piece.dtype == dtype
        yield tensor_bytes(piece)


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    """Length of the JSON header, then the header, padded so that values start at a multiple of 8."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
