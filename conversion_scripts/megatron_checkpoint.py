"""A Megatron checkpoint as both formats present it: arguments, named lazy tensors, and what is not weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..support.errors import ConversionError, quoted, shortened, size_text
from .hub_path import HubPath, SourcePath, open_source
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
        layout: How it was split and written, for `gengram info`.
    """

    path: SourcePath
    format: str
    iteration: int | None
    args: dict[str, Any]
    tensors: dict[str, LazyTensor]
    dropped: list[Dropped] = field(default_factory=list)
    files: list[SourcePath] = field(default_factory=list)
    layout: str = ""


def open_checkpoint(path: str | SourcePath, revision: str | None = None) -> MegatronCheckpoint:
    """The checkpoint at `path`: its root (with `latest_checkpointed_iteration.txt`) or the folder of one iteration.

    Args:
        path: A local folder, or `ORG/NAME[/FOLDER]` on the Hub, of which then only metadata is fetched.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConversionError: if there is none, it is incomplete, damaged or of an unsupported layout.
        FetchError: if the Hub cannot be reached.
    """
    from .megatron_torch import open_torch_checkpoint
    from .megatron_torch_dist import open_torch_dist_checkpoint

    folder = find_iteration(open_source(path, revision))
    if checkpoint_format(folder) == "torch_dist":
        return open_torch_dist_checkpoint(folder)
    return open_torch_checkpoint(folder)


def checkpoint_format(folder: SourcePath) -> str | None:
    """`"torch"`, `"torch_dist"`, or `None` if the folder is not the iteration of a Megatron checkpoint."""
    ranks = any(child.name.startswith("mp_rank_") for child in folder.iterdir())
    distributed = any((folder / name).exists() for name in (".metadata", "metadata.json", "common.pt"))
    distributed = distributed or any(child.suffix == ".distcp" for child in folder.iterdir())
    if ranks and distributed:
        raise ConversionError(
            f"{folder} holds both mp_rank_* folders (format torch) and .metadata or .distcp files (format "
            "torch_dist); put each checkpoint into a folder of its own"
        )
    return "torch" if ranks else "torch_dist" if distributed else None


def find_iteration(path: SourcePath) -> SourcePath:
    """The folder that holds one iteration's files."""
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise ConversionError(f"{path} {kind}; expected the folder of a Megatron checkpoint")
    if isinstance(path, HubPath):
        path = _only_checkpoint(path)
    if checkpoint_format(path) is not None:
        return path
    iterations = sorted(child.name for child in path.iterdir() if child.is_dir() and _is_iteration(child.name))
    tracker = path / TRACKER
    if tracker.is_file():
        with tracker.open("rb") as file:
            text = file.read(64).decode("ascii", "replace").strip()
        if not re.fullmatch(r"release|[0-9]{1,12}", text):
            raise ConversionError(
                f"{tracker} must hold the number of an iteration or 'release', got {shortened(text)}"
            )
        name = text if text == "release" else f"iter_{int(text):07d}"
        if not (path / name).is_dir():
            there = f"; found {quoted(iterations)}" if iterations else ""
            raise ConversionError(f"{tracker} points to {name}, which is missing{there}; fetch it, or name its folder")
    elif len(iterations) == 1:
        name = iterations[0]
    elif iterations:
        raise ConversionError(f"{path} holds several iterations and no {TRACKER}; name one of {quoted(iterations)}")
    else:
        found = quoted(sorted(child.name for child in path.iterdir())) or "nothing"
        hint = "; it looks like a converted folder already" if (path / "config.json").is_file() else ""
        raise ConversionError(
            f"{path} is not a Megatron checkpoint: expected mp_rank_*/model_optim_rng.pt (format torch), or "
            f".metadata, common.pt and *.distcp (format torch_dist), or iter_* folders of these; found {found}{hint}"
        )
    if checkpoint_format(path / name) is None:
        found = quoted(sorted(child.name for child in (path / name).iterdir())) or "nothing"
        raise ConversionError(
            f"{path / name} is neither a torch checkpoint (mp_rank_*/model_optim_rng.pt) nor a torch_dist one "
            f"(.metadata, common.pt, *.distcp); found {found}"
        )
    return path / name


def _only_checkpoint(folder: HubPath) -> HubPath:
    """The one folder of a repository, at or below `folder`, that is a checkpoint's root; `folder` if there is none."""
    roots = set()
    for name in folder.repository.files:
        file = folder.repository.root / name
        if folder.relative not in file.relative.parents:
            continue
        if file.name == TRACKER:
            roots.add(file.parent)
        elif file.name == ".metadata" or file.parent.name.startswith("mp_rank_"):
            iteration = file.parent if file.name == ".metadata" else file.parent.parent
            inner = iteration != folder and _is_iteration(iteration.name)
            roots.add(iteration.parent if inner else iteration)
    if len(roots) > 1:
        names = [f"{folder.repository.repo_id}/{root.relative}".removesuffix("/.") for root in roots]
        raise ConversionError(f"{folder} holds several checkpoints; name one of them: {quoted(sorted(names))}")
    return roots.pop() if roots else folder


def _is_iteration(name: str) -> bool:
    return name == "release" or re.fullmatch(r"iter_[0-9]{7,}", name) is not None


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


def argument(args: Mapping[str, Any], name: str, default: int, most: int = 2**24) -> int:
    """An integer argument in `1..most`; absent or None is the default."""
    value = args.get(name)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise ConversionError(f"args.{name} must be an integer in 1..{most}, got {shortened(value)}")
    return value


def is_plain(value: Any) -> bool:
    """Whether a value from a file is a scalar, which is safe to compare and print."""
    return value is None or isinstance(value, bool | int | float | str)


def tensor_bytes(value: Any) -> int:
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
        f"{len(entries)} x {reason} ({size_text(sum(e.nbytes for e in entries))}; for example {entries[0].name})"
        for reason, entries in groups.items()
    ]
