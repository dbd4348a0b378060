"""`gengram diff`: compares the weights of two checkpoints of any kind, by their names in the Hugging Face model.

Tensors stream through memory in pieces, experts one by one. What a checkpoint holds beside the model (optimizer state,
dead weights) is not compared.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..configuration.configuration_gengram import GengramConfig
from ..support.errors import ConversionError, shortened
from ..support.printable import printable
from .files.dtypes import dtype_name
from .files.file_facts import check_unchanged, facts_in
from .files.hf_folder import StoredTensor, read_config, stored_tensors
from .files.tensor_memory import reused_memory
from .files.weight_hash import tensor_bytes
from .mapping.arguments import config_from_args, differing_fields
from .mapping.match import Move, Output, match
from .mapping.quantized import Kinds, as_floats, numbers_name, quantization_of, scale_name
from .megatron.checkpoint import MegatronCheckpoint
from .megatron.open_checkpoint import NotACheckpointError, open_checkpoint

_BLOCK = 2**22  # elements whose difference is taken at once


@dataclass(frozen=True)
class Weight:
    """A tensor of the Hugging Face model, wherever it lies; `pieces` follow each other along its first axis."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtypes[0]).itemsize


@dataclass
class Difference:
    """How one tensor differs.

    Args:
        kind: `"shape"` (values were not compared), `"values"`, or `"dtype"` (equal values, stored differently).
        largest: The largest absolute difference; `None` where it was not taken or is not finite.
        elements: How many elements differ.
    """

    name: str
    kind: str
    first: str
    second: str
    largest: float | None = None
    elements: int | None = None

    def __str__(self) -> str:
        sides = f"{self.first} and {self.second}" if self.first != self.second else self.first
        if self.kind == "values":
            largest = "a number that is not finite" if self.largest is None else f"{self.largest:.3g}"
            return f"{printable(self.name)}: {self.elements:,} elements differ, by at most {largest} ({sides})"
        return f"{printable(self.name)}: {self.kind} differs ({sides})"


@dataclass
class DiffReport:
    """What two checkpoints have in common and what not."""

    first: str
    second: str
    equal: int = 0
    differing: list[Difference] = field(default_factory=list)
    only_in_first: list[str] = field(default_factory=list)
    only_in_second: list[str] = field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return not (self.differing or self.only_in_first or self.only_in_second or self.config)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}

    def summary(self) -> str:
        """The report for people: every difference on a line."""
        lines = [f"{self.equal} tensors are equal"]
        lines += [f"differs: {difference}" for difference in self.differing]
        lines += [f"only in {self.first}: {printable(name)}" for name in self.only_in_first]
        lines += [f"only in {self.second}: {printable(name)}" for name in self.only_in_second]
        lines += [f"config: {name} is {shortened(a)} and {shortened(b)}" for name, (a, b) in self.config.items()]
        verdict = "the same model" if self.same else "not the same model"
        return "\n".join([*lines, f"{self.first} and {self.second}: {verdict}"])


@reused_memory()
def diff_checkpoints(first: str | Path, second: str | Path, progress: bool = True) -> DiffReport:
    """Compares two checkpoints: Megatron's `torch` or `torch_dist`, or a Hugging Face folder, in any combination.

    Values are compared exactly, as numbers: a dtype that holds the same ones is reported as a difference of dtype.

    Raises:
        ConversionError: if one of them cannot be read.
    """
    opened = [open_weights(Path(path)) for path in (first, second)]
    (config_a, weights_a), (config_b, weights_b) = ((side.config, side.weights) for side in opened)
    report = DiffReport(str(first), str(second))
    hf = [_is_hf(Path(path)) for path in (first, second)]
    for name in differing_fields(config_a, config_b, all_fields=all(hf)):
        report.config[name] = (getattr(config_a, name), getattr(config_b, name))
    kinds = [quantization_of(config) for config in (config_a, config_b)]
    for name in Kinds._fields:
        before, after = (getattr(kind, name) for kind in kinds)
        if before != after:
            report.config[f"quantization_config.{name}"] = (before, after)
    report.only_in_first = [name for name in weights_a if name not in weights_b]
    report.only_in_second = [name for name in weights_b if name not in weights_a]
    # In the order of a Megatron checkpoint, so that what several tensors are made from is read once.
    order, other = (weights_b, weights_a) if hf[0] else (weights_a, weights_b)
    shared = [name for name in order if name in other]
    total = sum(weights_a[name].nbytes for name in shared)
    with tqdm(total=total, unit="B", unit_scale=True, desc="compare", disable=not progress) as bar:
        for name in shared:
            difference = _difference(name, weights_a[name], weights_b[name])
            if difference is None:
                report.equal += 1
            else:
                report.differing.append(difference)
            bar.update(weights_a[name].nbytes)
    for side in opened:
        side.check_unchanged()
    return report


@dataclass(frozen=True)
class OpenedWeights:
    """A checkpoint of any kind: its configuration, its weights under the names of the Hugging Face model, and a check
    that its files are still those that were opened."""

    config: GengramConfig
    weights: dict[str, Weight]
    check_unchanged: Callable[[], None]


def open_weights(path: Path) -> OpenedWeights:
    """The checkpoint or folder at `path`.

    Raises:
        ConversionError: if it is none, or is damaged.
    """
    if _is_hf(path):
        facts = facts_in(path)
        config, stored = read_config(path), stored_tensors(path)
        files = [path / "config.json", *dict.fromkeys(tensor.path for tensor in stored.values())]
        weights = _stored_weights(stored, quantization_of(config))
        return OpenedWeights(config, weights, partial(check_unchanged, path, files, facts))
    try:
        checkpoint = open_checkpoint(path)
    except NotACheckpointError as error:
        raise ConversionError(f"{error}, or a Hugging Face folder, which has a config.json") from None
    config = config_from_args(checkpoint.args)
    plan = match(checkpoint.shapes, config)
    reader = _Reader(checkpoint)
    weights = {output.name: _planned_weight(output, checkpoint, reader) for output in plan.outputs}
    return OpenedWeights(config, weights, checkpoint.check_unchanged)


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def _stored_weights(stored: dict[str, StoredTensor], kinds: Kinds) -> dict[str, Weight]:
    """Weights by name; quantised ones are the floats that they stand for."""
    weights = {}
    for name, tensor in stored.items():
        scale = stored.get(scale_name(name))
        kind = kinds.of(numbers_name(name) or name)
        if kind is None or (scale is None and numbers_name(name) is None):
            weights[name] = _stored_weight(tensor)
        elif scale is not None:
            shape = (*tensor.shape[:-1], tensor.shape[-1] * (1 if kind == "int8" else 2))
            weights[name] = Weight(shape, (kind,), partial(_quantized_pieces, tensor, scale))
    return weights


def _quantized_pieces(numbers: StoredTensor, scale: StoredTensor) -> Iterator[torch.Tensor]:
    if len(numbers.shape) == 2:
        yield as_floats(numbers.read(), scale.read())
        return
    for index in range(numbers.shape[0]):
        yield as_floats(numbers.read(index), scale.read(index))


def _stored_weight(tensor: StoredTensor) -> Weight:
    return Weight(tensor.shape, (dtype_name(tensor.dtype),), partial(_stored_pieces, tensor))


def _stored_pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    if ".experts." not in tensor.name:
        yield tensor.read()
    else:
        for index in range(tensor.shape[0]):
            yield tensor.read(index)


def _planned_weight(output: Output, checkpoint: MegatronCheckpoint, reader: "_Reader") -> Weight:
    dtypes = dict.fromkeys(dtype_name(checkpoint.tensors[move.source].dtype) for move, _ in output.parts)
    return Weight(output.shape, tuple(dtypes), partial(_planned_pieces, output, reader))


def _planned_pieces(output: Output, reader: "_Reader") -> Iterator[torch.Tensor]:
    for move, which in output.parts:
        tensor = reader.read(move)[which]
        if ".experts." in output.name and move.entry.targets[which].index is None:
            yield from tensor
        else:
            yield tensor


class _Reader:
    """Keeps the parts of the last source tensor: queries, keys and values come from one."""

    def __init__(self, checkpoint: MegatronCheckpoint):
        self.checkpoint = checkpoint
        self._last: tuple[str, list[torch.Tensor]] | None = None

    def read(self, move: Move) -> list[torch.Tensor]:
        if self._last is None or self._last[0] != move.source:
            self._last = None
            self._last = (move.source, move.entry.layout.to_hf(self.checkpoint.tensors[move.source].read()))
        return self._last[1]


def _difference(name: str, a: Weight, b: Weight) -> Difference | None:
    first, second = "/".join(a.dtypes), "/".join(b.dtypes)
    if a.shape != b.shape:
        return Difference(name, "shape", f"{first} {list(a.shape)}", f"{second} {list(b.shape)}")
    elements, largest = 0, 0.0
    for piece_a, piece_b in zip(a.pieces(), b.pieces(), strict=True):
        count, most = _compare(piece_a, piece_b)
        elements += count
        largest = max(largest, most)
    if elements:
        return Difference(name, "values", first, second, largest if math.isfinite(largest) else None, elements)
    return None if a.dtypes == b.dtypes else Difference(name, "dtype", first, second)


def _compare(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """How many elements differ, and by how much at most (infinity where one is not a number); NaN equals NaN."""
    if a.dtype == b.dtype and tensor_bytes(a) == tensor_bytes(b):
        return 0, 0.0
    count, largest = 0, 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, len(flat_a), _BLOCK):
        x, y = (flat[start : start + _BLOCK].double() for flat in (flat_a, flat_b))
        apart = (x != y) & ~(x.isnan() & y.isnan())
        if apart.any():
            count += int(apart.sum())
            largest = max(largest, float((x - y)[apart].abs().nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return count, largest
