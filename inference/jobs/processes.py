"""Which chunks are this process's."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """Part `index` (from 0) of `count` parts of a job.

    Raises:
        ValueError: if there is no such part.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"expected a part of 1 to {self.count}, got {self.index + 1} of {self.count}.")

    @classmethod
    def parse(cls, text: str) -> "Share":
        """`2/8` is the second of eight.

        Raises:
            ValueError: for another text.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise ValueError(f"--shard: expected a part such as 2/8 (the second of eight), got {text!r}.")
        return cls(int(match[1]) - 1, int(match[2]))

    def consecutive(self, items: int, starts: Sequence[int]) -> range:
        """Neighbours: the outputs of all parts, one behind the other, are the whole output.

        Args:
            items: how many there are.
            starts: where a part may start.
        """
        ends = [*starts, items]
        return range(*(ends[len(starts) * index // self.count] for index in (self.index, self.index + 1)))

    def spread(self, items: range) -> range:
        """Every `count`-th one, so that processes that run at the same time end at the same time."""
        return items[self.index :: self.count]


def launched_process() -> Share:
    """This process among those that torchrun or accelerate launched for one job; alone without them."""
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def device_of_process(device: str | None) -> str | None:
    """`device`, or the GPU of this process's number on its machine."""
    if device is not None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
