"""How tensor and expert parallelism cut Megatron's tensors, for reading and writing the `torch` format."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..support.errors import ConversionError


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


# What is not listed is on every rank: norms, router, memory. Axes: `VocabParallelEmbedding`, `ColumnParallelLinear`
# (rows of the weight) and `RowParallelLinear` (columns) in the authors' `megatron/core/tensor_parallel/layers.py`.
_LAYER = r"decoder\.layers\.\d+\."
_SPLITS = (
    (re.compile(r"embedding\.word_embeddings\.weight|output_layer\.weight"), Split(0)),
    (re.compile(_LAYER + r"self_attention\.linear_qkv\.weight"), Split(0)),  # whole query groups
    (re.compile(_LAYER + r"self_attention\.linear_proj\.weight"), Split(1)),
    (re.compile(_LAYER + r"mlp\.(experts\.(local_experts\.\d+\.)?)?linear_fc1\.weight\d*"), Split(0, halves=True)),
    (re.compile(_LAYER + r"mlp\.(experts\.(local_experts\.\d+\.)?)?linear_fc2\.weight\d*"), Split(1)),
)
_EXPERT = re.compile(
    rf"({_LAYER}mlp\.experts\.)(local_experts\.(\d+)\.linear_fc[12]\.weight|linear_fc[12]\.weight(\d+))"
)
LEGACY_EXPERTS = re.compile(_LAYER + r"mlp\.experts\.weight[12]")


def split_of(name: str) -> Split:
    """How the tensor `name` is cut."""
    return next((split for pattern, split in _SPLITS if pattern.fullmatch(name)), Split())


def expert_of(name: str) -> int | None:
    """The number in the name of an expert's weight; `None` for other names."""
    match = _EXPERT.fullmatch(name)
    return int(match[3] or match[4]) if match else None


def with_expert(name: str, expert: int) -> str:
    """The name of an expert's weight with another number."""
    match = _EXPERT.fullmatch(name)
    assert match is not None, name
    start, end = match.span(3) if match[3] else match.span(4)
    return f"{name[:start]}{expert}{name[end:]}"


@dataclass(frozen=True)
class Rank:
    """One `mp_rank_*` folder of one pipeline stage: what it holds."""

    tensor: int  # rank for what is not an expert
    expert: int  # which slice of the experts
    expert_tensor: int  # rank inside these experts


def saving_ranks(tensor: int, expert: int, expert_tensor: int) -> list[Rank]:
    """The ranks of one stage that write a `torch` checkpoint: those that are first among copies of their experts.

    Ranks are numbered with tensor parallelism innermost, for experts too (the authors' `parallel_state.py`, order
    tp-cp-ep-dp-pp).
    """
    return [
        Rank(number % tensor, number // expert_tensor % expert, number % expert_tensor)
        for number in range(expert_tensor * expert)
    ]


def rank_folder(rank: Rank, stage: int, stages: int, expert_slices: int) -> str:
    """Name of a rank's folder (`get_checkpoint_name` in the authors' `checkpointing.py`)."""
    name = f"mp_rank_{rank.tensor:02d}"
    name += f"_{stage:03d}" if stages > 1 else ""
    return name + (f"_{rank.expert:03d}" if expert_slices > 1 else "")
