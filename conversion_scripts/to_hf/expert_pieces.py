"""What is written of each tensor: the source's values or, of quantised weights, numbers and then scales."""

from collections.abc import Container, Iterator, Mapping
from itertools import islice

import torch

from ..files.safetensors_writer import HashedTensor, StartedFile, TensorSpec
from ..mapping.quantized import numbers_name, quantized
from .job import ConversionJob
from .source_reader import SourceReader


def slices_there(
    shards: dict[str, list[TensorSpec]], kept: Container[str], started: Mapping[str, StartedFile]
) -> dict[str, int]:
    """How many pieces of each tensor an earlier run wrote, at least, so that their scales are no longer known."""
    there = {}
    for name, shard in shards.items():
        start = started.get(name, StartedFile())
        for place, spec in enumerate(shard):
            if name in kept or spec.name in start.tensors:
                there[spec.name] = spec.shape[0]
            elif place == len(start.tensors):
                there[spec.name] = len(start.slices)
    return there


class ExpertPieces:
    """The pieces of each tensor, quantised when they are read if they are to be; scales are kept until they are due.

    Args:
        there: `slices_there`.
    """

    def __init__(self, job: ConversionJob, reader: SourceReader, there: Mapping[str, int]):
        self._job = job
        self._reader = reader
        self._there = there
        self._scales: dict[str, list[torch.Tensor]] = {}

    def of(self, spec: TensorSpec, first: int) -> Iterator[torch.Tensor | HashedTensor]:
        """What makes a tensor, piece by piece along its first axis, without the first so many."""
        numbers = numbers_name(spec.name)
        if self._job.kinds.of(numbers or spec.name) is None:
            yield from self._reader.pieces(spec, first)
        elif numbers is None:
            for piece in self._reader.pieces(spec, first):
                result, scale = self._quantized(spec.name, piece)
                del piece
                self._scales.setdefault(spec.name, []).append(scale)
                yield result
        else:
            there = self._there.get(numbers, 0)
            for piece in islice(self._reader.pieces(spec, first), max(there - first, 0)):
                yield self._quantized(numbers, piece)[1]
            yield from self._scales.pop(numbers, [])[max(first - there, 0) :]

    def _quantized(self, name: str, piece: torch.Tensor | HashedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        kind = self._job.kinds.of(name)
        assert kind is not None
        values = piece.values if isinstance(piece, HashedTensor) else piece
        return quantized(name, values, kind, self._job.dtype)
