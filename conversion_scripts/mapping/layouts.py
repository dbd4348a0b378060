"""How values move: from a Megatron tensor to the Hugging Face ones and back, and between a tensor and parts of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...support.errors import ConversionError


class Layout(Protocol):
    """How one Megatron tensor becomes one or more Hugging Face tensors, and back; values are only moved."""

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor


@dataclass(frozen=True)
class FusedQkv:
    """Rows of queries, keys and values: per group its query heads, one key head, one value head."""

    heads: int
    groups: int
    head_dim: int

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        hidden = tensor.shape[-1]
        per_group = self.heads // self.groups
        blocks = tensor.reshape(self.groups, per_group + 2, self.head_dim, hidden)
        parts = blocks.split([per_group, 1, 1], dim=1)
        return [part.reshape(-1, hidden) for part in parts]

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        hidden = tensors[0].shape[-1]
        blocks = [tensor.reshape(self.groups, -1, self.head_dim, hidden) for tensor in tensors]
        return torch.cat(blocks, dim=1).reshape(-1, hidden)


@dataclass(frozen=True)
class GateUp:
    """Rows of the gate, then rows of the up projection, as two tensors (dense feed-forward)."""

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(tensor.chunk(2, dim=0))

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors), dim=0)


@dataclass(frozen=True)
class LegacyGroupedExperts:
    """All experts of a layer in one matrix, transposed: legacy `GroupedMLP` (`view(experts, …)` in `experts.py`).

    Args:
        experts: How many experts the matrix holds.
        inputs: Columns of an expert's weight as PyTorch has it, (outputs, inputs).
        wide: Whether the matrix is (inputs, experts * outputs), as `weight1`, or (experts * inputs, outputs), as
            `weight2`. Either is read as (experts, inputs, outputs).
    """

    experts: int
    inputs: int
    wide: bool

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.reshape(self.experts, self.inputs, -1).transpose(1, 2)]  # (experts, outputs, inputs)

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        rows = self.inputs if self.wide else self.experts * self.inputs
        return tensor.transpose(1, 2).reshape(rows, -1)


@dataclass(frozen=True)
class Split:
    """How one tensor lies on the ranks of a tensor-parallel group.

    Args:
        axis: The axis that is cut; `None` if every rank holds the whole tensor.
        halves: Whether a rank holds its part of the gate, then its part of the up projection.
    """

    axis: int | None = None
    halves: bool = False

    def shape(self, shape: tuple[int, ...], ranks: int, name: str) -> tuple[int, ...]:
        """The shape of one rank's part.

        Raises:
            ConversionError: if the axis cannot be cut into `ranks` parts.
        """
        if self.axis is None:
            return shape
        pieces = 2 * ranks if self.halves else ranks
        if shape[self.axis] % pieces:
            raise ConversionError(
                f"axis {self.axis} of {name}, of shape {shape}, must be a multiple of {pieces} for tensor parallelism "
                f"{ranks}"
            )
        return (*shape[: self.axis], shape[self.axis] // ranks, *shape[self.axis + 1 :])

    def whole_shape(self, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """The shape of the whole tensor, from that of a part."""
        if self.axis is None:
            return shape
        return (*shape[: self.axis], shape[self.axis] * ranks, *shape[self.axis + 1 :])

    def part(self, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """What `rank` holds of the whole tensor."""
        if self.axis is None or ranks == 1:
            return tensor
        if self.halves:
            halves = tensor.chunk(2, dim=self.axis)
            return torch.cat([half.chunk(ranks, dim=self.axis)[rank] for half in halves], dim=self.axis)
        return tensor.chunk(ranks, dim=self.axis)[rank].contiguous()

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from the parts of all ranks, in their order."""
        if self.axis is None or len(parts) == 1:
            return parts[0]
        if self.halves:
            pairs = [part.chunk(2, dim=self.axis) for part in parts]
            parts = [pair[half] for half in (0, 1) for pair in pairs]
        return torch.cat(list(parts), dim=self.axis)
