"""A Megatron checkpoint as both formats present it: arguments, named lazy tensors, and what is not weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...support.errors import ConversionError, shortened, size_text
from ...support.printable import printable
from ..files.file_facts import Facts, check_unchanged
from ..hub.hub_path import SourcePath
from ..mapping.match import WeightPlan
from .safe_pickle import ForeignObject, TensorReference
from .torch_archive import LazyTensor

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Dropped:
    """Something that a checkpoint holds and a conversion leaves out."""

    name: str
    reason: str
    nbytes: int = 0


@dataclass
class MegatronCheckpoint:
    """An opened checkpoint; weights are read when asked for.

    Args:
        path: The folder of the iteration.
        format: `"torch"` or `"torch_dist"`.
        iteration: Training steps, if the checkpoint says.
        args: Megatron's arguments, by name.
        tensors: Weights by Megatron's names with GLOBAL layer numbers from 0; in both formats experts are separate:
            `decoder.layers.3.mlp.experts.linear_fc1.weight0`.
        dropped: What is not weights: optimizer, random states, `_extra_state`.
        files: The files that hold the checkpoint.
        facts: What the system said of them before they were opened.
        layout: How it was split and written, for `gengram info`.
    """

    path: SourcePath
    format: str
    iteration: int | None
    args: dict[str, Any]
    tensors: dict[str, LazyTensor]
    dropped: list[Dropped] = field(default_factory=list)
    files: list[SourcePath] = field(default_factory=list)
    facts: dict[SourcePath, Facts] = field(default_factory=dict)
    layout: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def check_unchanged(self) -> None:
        """Refuses what was read if a file has changed since the checkpoint was opened.

        Raises:
            ConversionError: if one did, or is gone; the message names it.
        """
        check_unchanged(self.path, self.files, self.facts)

    def left_out(self, plan: WeightPlan) -> list[Dropped]:
        """What a conversion by this plan leaves out: weights with the table's reasons, and what is not weights."""
        weights = [Dropped(move.source, move.entry.dropped, self.tensors[move.source].nbytes) for move in plan.dropped]
        return weights + self.dropped


def args_of(saved: Any, source: SourcePath) -> dict[str, Any]:
    """Megatron's arguments from the top level of a saved dictionary."""
    namespace = saved.get("args") if isinstance(saved, dict) else None
    state = namespace.state if isinstance(namespace, ForeignObject) else namespace
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConversionError(
            f"{source}: expected Megatron's arguments under 'args', which say what the model is; got "
            f"{shortened(state)}"
        )
    return state


def iteration_of(saved: Mapping[str, Any]) -> int | None:
    """The training step of a saved dictionary."""
    iteration = saved.get("iteration")
    return iteration if type(iteration) is int and 0 <= iteration < 2**62 else None


def nbytes_inside(value: Any) -> int:
    """Bytes of all tensors inside a nested object; shared parts are counted once and nothing recurses."""
    total, seen, todo = 0, set(), [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str | bytes | int | float | bool | None) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, TensorReference):
            total += item.storage.length * item.dtype.itemsize if id(item.storage) not in seen else 0
            seen.add(id(item.storage))
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)
        elif isinstance(item, ForeignObject):
            todo.extend((item.arguments, item.state, item.items))
    return total


def summary_of_dropped(dropped: list[Dropped]) -> list[str]:
    """One line per reason: how many entries, how many bytes, one name."""
    groups: dict[str, list[Dropped]] = {}
    for entry in dropped:
        groups.setdefault(entry.reason, []).append(entry)
    return [
        f"{len(entries)} x {reason} ({size_text(sum(e.nbytes for e in entries))}; for example "
        f"{printable(entries[0].name)})"
        for reason, entries in groups.items()
    ]
