"""Reader of Megatron's `torch_dist` format: `.metadata` says in which bytes of which `.distcp` file a chunk lies.

Layers, and experts inside them, are stacked along leading axes (`decoder.layers.mlp.experts.experts.linear_fc1.weight`
is (layers, experts, 2 * width, hidden)) and cut into chunks. Here every layer and expert is a tensor of its own, put
together from the chunks that it touches when it is read; the stacked tensor is never built.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch

from ...support.errors import ConversionError, quoted, shortened
from ...support.lfs_pointer import POINTER_BYTES, refuse_lfs_pointer
from ..files.tensor_memory import empty_tensor
from ..hub.byte_range import Span
from ..hub.hub_path import SourcePath, fetch_now, size_of
from ..mapping.argument_codecs import integer_argument
from ..mapping.weight_table import MOST_TENSORS
from .checkpoint import Dropped, MegatronCheckpoint, args_of, iteration_of
from .safe_pickle import MAX_PICKLE_BYTES, ForeignObject, TensorReference, load_pickle
from .torch_archive import LazyTensor, TorchArchive

# Names that are not weights. Every match is of the whole name, so that `optimizer.state.param.decoder.layers…`, which
# has the shapes of the model, can never be taken for it.
_NOT_WEIGHTS = (
    (re.compile(r"(?s:optimizer\..*)"), "optimizer state"),
    (re.compile(r"(?s:chained_\d+\.optimizer\..*)"), "optimizer state"),
    (re.compile(r"(?s:rng_state(/.*)?)"), "random number states"),
    (re.compile(r"(?s:rerun_state_machine_state(/.*)?)"), "rerun state of the trainer"),
    (
        re.compile(r"(?s:(decoder|embedding|output_layer)(\..*)?\._extra_state(/.*)?)"),
        "_extra_state (FP8 scales, unused)",
    ),
)
_STACKED_LAYERS = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_STACKED_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(linear_fc[12]\.weight)")
_MAX_CELLS = 2**20


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: SourcePath
    start: int
    length: int
    checked: set[int] = field(default_factory=set, compare=False)  # as `TorchArchive` has it


@dataclass(frozen=True)
class ChunkedTensor:
    """A whole tensor of the checkpoint, cut into chunks that cover it exactly once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    _by_index: dict[int, dict[tuple[int, ...], list[Chunk]]] = field(default_factory=dict, compare=False)

    def part(self, index: tuple[int, ...]) -> LazyTensor:
        """The tensor at `index` along the leading axes."""
        spans = tuple(_span(chunk, inside, self.dtype) for chunk, inside in self._touched(index))
        unchecked: list[str] = []
        return LazyTensor(self.shape[len(index) :], self.dtype, partial(self.read, index, unchecked), spans, unchecked)

    def read(self, index: tuple[int, ...], unchecked: list[str]) -> torch.Tensor:
        axes = len(index)
        result = empty_tensor(self.shape[axes:], self.dtype)  # every element lies in a chunk
        for chunk, inside in self._touched(index):
            target = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets[axes:], chunk.sizes[axes:], strict=True)
            )
            self._read_chunk(chunk, inside, result[target] if target else result, unchecked)
        return result

    def _touched(self, index: tuple[int, ...]) -> Iterator[tuple[Chunk, tuple[int, ...]]]:
        """The chunks that hold values at `index`, each with the index inside it."""
        axes = len(index)
        if axes not in self._by_index:
            self._by_index[axes] = self._grouped(axes)
        for chunk in self._by_index[axes][index]:
            yield chunk, tuple(i - offset for i, offset in zip(index, chunk.offsets, strict=False))

    def _grouped(self, axes: int) -> dict[tuple[int, ...], list[Chunk]]:
        """The chunks by the indices along the leading axes that they reach over."""
        reach = [prod(chunk.sizes[:axes]) for chunk in self.chunks]
        if sum(reach) > _MAX_CELLS:
            raise ConversionError(
                f"the {len(self.chunks)} chunks of {shortened(self.name)} reach over {sum(reach):,} layers and "
                f"experts together; at most {_MAX_CELLS:,} are read"
            )
        groups: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in self.chunks:
            boxes = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
            for index in product(*(range(offset, offset + size) for offset, size in boxes)):
                groups.setdefault(index, []).append(chunk)
        return groups

    def _read_chunk(self, chunk: Chunk, index: tuple[int, ...], out: torch.Tensor, unchecked: list[str]) -> None:
        archive = TorchArchive(chunk.path, chunk.start, chunk.length, chunk.checked)
        reference = archive.load()
        if not isinstance(reference, TensorReference):
            raise ConversionError(
                f"{chunk.path}: expected a chunk of {shortened(self.name)}, got {shortened(reference)}"
            )
        if reference.shape != chunk.sizes or reference.dtype != self.dtype:
            raise ConversionError(
                f"{chunk.path}: the chunk of {shortened(self.name)} at {chunk.offsets} must be {self.dtype} of shape "
                f"{chunk.sizes}, got {reference.dtype} of shape {reference.shape}"
            )
        if out.is_contiguous():
            archive.read(reference, index, out, unchecked)
        else:
            out.copy_(archive.read(reference, index, unchecked=unchecked))


def _span(chunk: Chunk, index: tuple[int, ...], dtype: torch.dtype) -> Span:
    """Where the part of a chunk lies: the archive that holds the chunk, if it is all of it."""
    if prod(chunk.sizes[: len(index)]) == 1:
        return Span(chunk.path, chunk.start, chunk.length)
    number = 0
    for i, size in zip(index, chunk.sizes, strict=False):
        number = number * size + i
    nbytes = prod(chunk.sizes[len(index) :]) * dtype.itemsize
    return Span(chunk.path, chunk.start + number * nbytes, nbytes)


def open_torch_dist_checkpoint(folder: SourcePath) -> MegatronCheckpoint:
    """The `torch_dist` checkpoint in `folder`; only `.metadata` and `common.pt` are read.

    Raises:
        ConversionError: if a file is missing, superfluous, truncated or malformed, chunks leave a gap or overlap, or a
            chunk lies outside the folder.
    """
    for name in (".metadata", "common.pt", "metadata.json"):
        if not (folder / name).is_file():
            raise ConversionError(
                f"{folder}: {name} is missing; a torch_dist checkpoint needs .metadata, metadata.json, common.pt and "
                "all .distcp files (hidden files are easily lost in copying)"
            )
    _check_backend(folder / "metadata.json")
    fetch_now(folder / "common.pt")
    common = TorchArchive(folder / "common.pt").load()
    args = args_of(common, folder / "common.pt")
    metadata_file = folder / ".metadata"
    if size_of(metadata_file) > MAX_PICKLE_BYTES:
        raise ConversionError(f"{metadata_file} has more than {MAX_PICKLE_BYTES} bytes")
    pickled = metadata_file.read_bytes()
    refuse_lfs_pointer(pickled[:POINTER_BYTES], str(metadata_file), ConversionError)
    metadata = load_pickle(pickled, str(metadata_file))
    described, places = _tables(metadata, metadata_file)

    checkpoint = MegatronCheckpoint(folder, "torch_dist", iteration_of(common), args, {})
    checkpoint.dropped.extend(
        Dropped(f"common.pt: {key if isinstance(key, str) else shortened(key)}", "trainer state")
        for key in common
        if key not in ("args", "checkpoint_version", "iteration", "content_metadata")
    )
    files = _check_files(folder, places)
    checkpoint.files = [folder / name for name in (".metadata", "common.pt", "metadata.json")]
    checkpoint.files += [folder / name for name in sorted(files)]
    stacked = False
    for name, entry in described.items():
        if not isinstance(name, str):
            raise ConversionError(f"{metadata_file}: names must be strings, got {shortened(name)}")
        reason = _reason_to_drop(name)
        if reason is not None:
            checkpoint.dropped.append(Dropped(name, reason, _stored_bytes(name, places)))
            continue
        tensor = _chunked_tensor(name, entry, places, folder, files)
        stacked |= _STACKED_LAYERS.fullmatch(name) is not None
        names = _unstacked(tensor, args, MOST_TENSORS - len(checkpoint.tensors))
        for part, index in names:
            if part in checkpoint.tensors:
                raise ConversionError(f"{metadata_file}: {shortened(part)} is there twice, stacked and by itself")
            checkpoint.tensors[part] = tensor.part(index)
    checkpoint.layout = f"{len(files)} .distcp files, layers {'stacked' if stacked else 'separate'}"
    return checkpoint


def _check_backend(path: SourcePath) -> None:
    with path.open("rb") as file:
        text = file.read(65536)
    refuse_lfs_pointer(text[:POINTER_BYTES], str(path), ConversionError)
    try:
        backend = json.loads(text).get("sharded_backend")
    except (ValueError, AttributeError, RecursionError):
        raise ConversionError(f"{path} must be a small JSON dictionary, got {shortened(text)}") from None
    if backend != "torch_dist":
        raise ConversionError(f"{path}: sharded_backend must be 'torch_dist', got {shortened(backend)}")


def _tables(metadata: Any, source: SourcePath) -> tuple[dict, dict[str, dict[tuple[int, ...] | None, ForeignObject]]]:
    """What each name is, and per name and chunk offset where the bytes lie."""
    described = metadata.get("state_dict_metadata") if isinstance(metadata, ForeignObject) else None
    storage = metadata.get("storage_data") if isinstance(metadata, ForeignObject) else None
    if not isinstance(described, dict) or not isinstance(storage, dict):
        raise ConversionError(
            f"{source}: expected torch.distributed.checkpoint metadata with state_dict_metadata and storage_data, got "
            f"{shortened(metadata)}"
        )
    places: dict[str, dict[tuple[int, ...] | None, ForeignObject]] = {}
    for index, info in storage.items():
        name = index.get("fqn") if isinstance(index, ForeignObject) else None
        if not isinstance(name, str) or not isinstance(info, ForeignObject):
            raise ConversionError(f"{source}: an entry of storage_data has no name; the file is damaged")
        offset = index.get("offset")
        key = None if offset is None else _integers(offset, name, "offset")
        chunks = places.setdefault(name, {})
        if key in chunks:
            raise ConversionError(f"{source}: the chunk of {shortened(name)} at {key} is there twice")
        chunks[key] = info
    return described, places


def _integers(values: Any, name: str, what: str) -> tuple[int, ...]:
    if isinstance(values, tuple | list) and len(values) <= 16:
        if all(type(value) is int and 0 <= value < 2**62 for value in values):
            return tuple(values)
    raise ConversionError(f"the {what} of {shortened(name)} must be up to 16 integers from 0, got {shortened(values)}")


def _reason_to_drop(name: str) -> str | None:
    return next((reason for pattern, reason in _NOT_WEIGHTS if pattern.fullmatch(name)), None)


def _check_files(folder: SourcePath, places: dict[str, dict]) -> dict[str, int]:
    """Sizes of the `.distcp` files that are there; all that hold weights are, and none is unknown to `.metadata`."""
    named: set[str] = set()
    needed: set[str] = set()
    for name, chunks in places.items():
        for info in chunks.values():
            path = info.get("relative_path")
            if not isinstance(path, str) or not re.fullmatch(r"[\w][\w.-]*\.distcp", path, re.ASCII):
                raise ConversionError(
                    f"{folder}/.metadata: a chunk must lie in a .distcp file of this folder, got {shortened(path)}"
                )
            named.add(path)
            if _reason_to_drop(name) is None:
                needed.add(path)
    there = {child.name: size_of(child) for child in folder.iterdir() if child.suffix == ".distcp" and child.is_file()}
    missing = sorted(needed - set(there))
    if missing:
        raise ConversionError(f"{folder}: missing {quoted(missing)}; fetch them again")
    for name in sorted(needed):
        if there[name] < POINTER_BYTES:
            refuse_lfs_pointer((folder / name).read_bytes(), str(folder / name), ConversionError)
    extra = sorted(name for name in set(there) - named if there[name])
    if extra:
        raise ConversionError(
            f"{folder}: {quoted(extra)} belong to no tensor of .metadata; two checkpoints were mixed, or .metadata is "
            "not theirs"
        )
    return {name: size for name, size in there.items() if name in named}


def _stored_bytes(name: str, places: dict[str, dict]) -> int:
    lengths = (info.get("length") for info in places.get(name, {}).values())
    return sum(length for length in lengths if type(length) is int and 0 <= length < 2**62)


def _chunked_tensor(name: str, entry: Any, places: dict, folder: SourcePath, files: dict[str, int]) -> ChunkedTensor:
    if not isinstance(entry, ForeignObject) or entry.kind.name != "TensorStorageMetadata":
        raise ConversionError(
            f"{folder}: {shortened(name)} is {shortened(entry)}, expected a tensor; this is not a weight that a "
            "Gengram model has"
        )
    properties = entry.get("properties")
    state = properties.state if isinstance(properties, ForeignObject) else None
    dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype") if state else None
    if not isinstance(dtype, torch.dtype):
        raise ConversionError(f"{folder}: {shortened(name)} has no readable dtype")
    shape = _integers(entry.get("size"), name, "shape")
    boxes = entry.get("chunks")
    if not isinstance(boxes, list) or prod(shape) == 0:
        raise ConversionError(f"{folder}: {shortened(name)} of shape {shape} has no chunks; the tensor is empty")
    chunks = []
    for box in boxes:
        if not isinstance(box, ForeignObject):
            raise ConversionError(f"{folder}: a chunk of {shortened(name)} is not readable")
        offsets = _integers(box.get("offsets"), name, "chunk offset")
        sizes = _integers(box.get("sizes"), name, "chunk size")
        inside = len(offsets) == len(sizes) == len(shape) and all(
            size >= 1 and offset + size <= extent for offset, size, extent in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise ConversionError(
                f"{folder}: the chunk of {shortened(name)} at {offsets} of size {sizes} lies outside the tensor of "
                f"shape {shape}"
            )
        chunks.append(_chunk(name, offsets, sizes, dtype, places, folder, files))
    _check_cover(name, shape, chunks, folder)
    return ChunkedTensor(name, shape, dtype, tuple(chunks))


def _chunk(name, offsets, sizes, dtype, places, folder: SourcePath, files: dict[str, int]) -> Chunk:
    info = places.get(name, {}).get(offsets)
    if info is None:
        raise ConversionError(f"{folder}: the chunk of {shortened(name)} at {offsets} is in no file")
    if info.get("transform_descriptors"):
        raise ConversionError(
            f"{folder}: the chunk of {shortened(name)} at {offsets} is compressed, which is unsupported"
        )
    path = info.get("relative_path")
    start, length = _integers((info.get("offset"), info.get("length")), name, "place in its file")
    if start + length > files[path]:
        raise ConversionError(
            f"{folder / path}: {shortened(name)} needs bytes {start} to {start + length}, but the file has "
            f"{files[path]}; it is truncated: fetch it again"
        )
    if prod(sizes) * dtype.itemsize > length:
        raise ConversionError(
            f"{folder / path}: the chunk of {shortened(name)} at {offsets} of size {sizes} cannot fit into {length} "
            "bytes"
        )
    return Chunk(offsets, sizes, folder / path, start, length)


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Chunk], folder: SourcePath) -> None:
    """Every element lies in exactly one chunk; counted on the grid that the chunks' edges make."""
    edges = [
        sorted({0, size, *(c.offsets[axis] for c in chunks), *(c.offsets[axis] + c.sizes[axis] for c in chunks)})
        for axis, size in enumerate(shape)
    ]
    cells = [len(edge) - 1 for edge in edges]
    if prod(cells) > _MAX_CELLS:
        raise ConversionError(f"{folder}: the {len(chunks)} chunks of {shortened(name)} do not form a regular grid")
    covered = np.zeros(cells, dtype=bool)
    for chunk in chunks:
        box = tuple(
            slice(bisect_left(edge, offset), bisect_left(edge, offset + size))
            for edge, offset, size in zip(edges, chunk.offsets, chunk.sizes, strict=True)
        )
        if covered[box].any():
            raise ConversionError(f"{folder}: chunks of {shortened(name)} overlap at {chunk.offsets}")
        covered[box] = True
    if not covered.all():
        cell = np.argwhere(~covered)[0]
        place = tuple(edge[i] for edge, i in zip(edges, cell, strict=True))
        raise ConversionError(f"{folder}: no chunk of {shortened(name)} holds its elements from {place} on")


def _unstacked(tensor: ChunkedTensor, args: dict[str, Any], most: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names of a tensor's layers and experts as in the `torch` format, with their indices along the leading axes.

    Raises:
        ConversionError: if the axes are not those of the arguments, or would be more than `most` names.
    """
    pattern, axes = tensor.name.replace("{", "{{").replace("}", "}}"), []
    layers = _STACKED_LAYERS.fullmatch(pattern)
    if layers:
        pattern = f"decoder.layers.{{layer}}.{layers[1]}"
        axes.append(("layer", "num_layers", integer_argument(args, "num_layers", 0, most=4096)))
    experts = _STACKED_EXPERTS.fullmatch(pattern)
    if experts:
        pattern = f"{experts[1]}{experts[2]}{{expert}}"
        axes.append(("expert", "num_experts", integer_argument(args, "num_experts", 0, most=4096)))
    expected = tuple(size for _, _, size in axes)
    if tensor.shape[: len(axes)] != expected:
        what = " and ".join(f"args.{name} = {size}" for _, name, size in axes)
        raise ConversionError(f"{shortened(tensor.name)}: leading axes must be {what}, got shape {tensor.shape}")
    if prod(expected) > most:
        raise ConversionError(
            f"{shortened(tensor.name)} holds {prod(expected):,} tensors of layers and experts; at most "
            f"{MOST_TENSORS:,} are read of a checkpoint, and no model has so many"
        )
    indices = list(product(*(range(size) for size in expected)))
    return [
        (pattern.format(**{axis: i for (axis, _, _), i in zip(axes, index, strict=True)}), index) for index in indices
    ]
