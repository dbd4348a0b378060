"""What a checkpoint of either format holds beside its weights, as the released ones do.

Both formats have the names of Transformer Engine's layers, with the empty `_extra_state` that these layers save: the
authors' loader of `torch_dist` asks for every one of them.
"""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

CHECKPOINT_VERSION = 3.0
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
NO_EXTRA_STATE = torch.empty(0, dtype=torch.uint8)

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Architecture:
    """What decides the keys of a checkpoint beside its tensors."""

    layers: int
    experts: int  # 0: dense

    @property
    def extra_states(self) -> tuple[str, ...]:
        """Modules of a layer with a key of their own in both formats, experts aside."""
        shared = ("self_attention.linear_proj", "self_attention.linear_qkv")
        return (*shared, *(("pre_mlp_layernorm",) if self.experts else ("mlp.linear_fc1", "mlp.linear_fc2")))


def top_level(args: argparse.Namespace, iteration: int) -> dict[str, Any]:
    """What both formats say beside the weights."""
    return {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }


def to_disk(file: BinaryIO) -> None:
    """Writes what is still in memory, and waits for the disk."""
    file.flush()
    os.fsync(file.fileno())
