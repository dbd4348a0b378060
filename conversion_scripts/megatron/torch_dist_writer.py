"""Writer of Megatron's `torch_dist` format from named lazy tensors, one tensor in memory at a time."""

import argparse
import contextlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..mapping.weight_table import split_of
from .torch_archive import LazyTensor
from .torch_archive_writer import write_torch_archive
from .written_keys import LAYER, NO_EXTRA_STATE, Architecture, Progress, to_disk, top_level

MOST_BYTES = 4 * 10**9  # of a .distcp file, after which the next one begins
_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    args: argparse.Namespace,
    iteration: int,
    architecture: Architecture,
    stacked: bool = True,
    progress: Progress = lambda count: None,
) -> None:
    """Writes `.metadata`, `common.pt`, `metadata.json` and `.distcp` files that PyTorch and Megatron read.

    Every layer and every expert of the stacked tensors is a chunk, gate and up projection are two, as Megatron cuts
    them (`apply_swiglu_sharded_factory` in the authors' `mlp.py`). `.metadata` is PyTorch's own class: what Megatron's
    subclass adds serves flattened optimizer tensors only.

    Args:
        stacked: Whether layers are stacked along a leading axis; Megatron keeps them separate if `moe_layer_freq` is a
            list.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    with contextlib.closing(_DistWriter(folder, progress)) as writer:
        for name, tensor in tensors.items():
            key, index, leading = _stacked_name(name, architecture, stacked)
            writer.add_tensor(key, index, leading, tensor, parts=2 if split_of(name).halves else 1)
        for key in _extra_state_keys(architecture, stacked):
            writer.add_bytes(key, [NO_EXTRA_STATE])
    metadata = Metadata(writer.described(), planner_data=None, storage_data=writer.places)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
        to_disk(file)
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    with open(folder / "common.pt", "wb") as file:
        torch.save({**top_level(args, iteration), "content_metadata": content}, file)
        to_disk(file)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")


def _stacked_name(
    name: str, architecture: Architecture, stacked: bool
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """A tensor's key, its index along the key's leading axes, and the sizes of these."""
    match = LAYER.fullmatch(name)
    if not match:
        return name, (), ()
    index, leading = ((int(match[1]),), (architecture.layers,)) if stacked else ((), ())
    prefix, tail = "decoder.layers." if stacked else f"decoder.layers.{match[1]}.", match[2]
    expert = _EXPERT.fullmatch(tail)
    if expert:
        tail = f"mlp.experts.experts.{expert[1]}"
        index, leading = (*index, int(expert[2])), (*leading, architecture.experts)
    return prefix + tail, index, leading


def _extra_state_keys(architecture: Architecture, stacked: bool) -> Iterator[str]:
    """Keys of objects end in their index and the number of them (`ShardedObject.unique_key` in `mapping.py`)."""
    layers, experts = architecture.layers, architecture.experts
    for layer in range(layers):
        prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."
        for module in architecture.extra_states:
            yield f"{prefix}{module}._extra_state/shard_{f'{layer}_{layers}' if stacked else '0_1'}"
        for module in ("linear_fc1", "linear_fc2"):
            for expert in range(experts):
                shard = f"{layer}.{expert}_{layers}.{experts}" if stacked else f"{expert}_{experts}"
                yield f"{prefix}mlp.experts.experts.{module}._extra_state/shard_{shard}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


class _DistWriter:
    """Puts archives one after another into `.distcp` files and remembers where."""

    def __init__(self, folder: Path, progress: Progress):
        self.folder = folder
        self.progress = progress
        self.places: dict[Any, Any] = {}
        self._file: BinaryIO | None = None
        self._number = 0
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...], list[Any]]] = {}
        self._objects: list[str] = []

    def add_tensor(
        self, key: str, index: tuple[int, ...], leading: tuple[int, ...], tensor: LazyTensor, parts: int
    ) -> None:
        """Writes the tensor at `index` of the stacked tensor `key`, cut into `parts` along its first axis."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        shape = (*leading, *tensor.shape)
        dtype, known, chunks = self._tensors.setdefault(key, (tensor.dtype, shape, []))
        assert (dtype, known) == (tensor.dtype, shape), f"{key}: {known} {dtype}, {shape} {tensor.dtype}"
        whole = tensor.read()
        for part, values in enumerate(whole.chunk(parts)):
            offsets = torch.Size((*index, part * values.shape[0], *(0 for _ in tensor.shape[1:])))
            piece = values.reshape((*(1 for _ in index), *values.shape))
            chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            self._add(key, offsets, partial(self._write_tensor, _as_lazy(piece)))

    def _write_tensor(self, tensor: LazyTensor, file: BinaryIO) -> None:
        write_torch_archive(file, tensor, progress=self.progress)

    def add_bytes(self, key: str, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self._objects.append(key)
        self._add(key, None, lambda file: file.write(buffer.getvalue()))

    def _add(self, key: str, offsets: torch.Size | None, write: Callable[[BinaryIO], Any]) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if self._file is not None and self._file.tell() > MOST_BYTES:
            self.close()
        if self._file is None:
            self._file = open(self.folder / f"__0_{self._number}.distcp", "wb")
            self._number += 1
        start = self._file.tell()
        write(self._file)
        place = _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)
        self.places[MetadataIndex(key, offsets)] = place

    def close(self) -> None:
        if self._file is not None:
            to_disk(self._file)
            self._file.close()
            self._file = None

    def described(self) -> dict[str, Any]:
        """What each key is, for `.metadata`."""
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        result: dict[str, Any] = {
            key: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
            for key, (dtype, shape, chunks) in self._tensors.items()
        }
        return result | {key: BytesStorageMetadata() for key in self._objects}


def _as_lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
