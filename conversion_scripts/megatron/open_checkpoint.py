"""Opens a Megatron checkpoint of either format, from its root or the folder of one iteration."""

import re
from pathlib import PurePosixPath

from ...support.errors import ConversionError, quoted, shortened
from ...support.lfs_pointer import POINTER_BYTES, refuse_lfs_pointer
from ...support.printable import printable
from ..files.file_facts import check_unchanged, facts_in
from ..hub.hub_path import HubPath, SourcePath, open_source
from .checkpoint import TRACKER, MegatronCheckpoint
from .torch_dist_reader import open_torch_dist_checkpoint
from .torch_reader import open_torch_checkpoint


class NotACheckpointError(ConversionError):
    """A path at which no Megatron checkpoint is."""


def open_checkpoint(path: str | SourcePath, revision: str | None = None) -> MegatronCheckpoint:
    """The checkpoint at `path`: its root (with `latest_checkpointed_iteration.txt`) or the folder of one iteration.

    Args:
        path: A local folder, or `ORG/NAME[/FOLDER]` on the Hub, of which then only metadata is fetched.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConversionError: if there is none, it is incomplete, damaged or of an unsupported layout.
        FetchError: if the Hub cannot be reached.
    """
    folder = find_iteration(open_source(path, revision))
    facts = facts_in(folder)
    is_distributed = checkpoint_format(folder) == "torch_dist"
    try:
        checkpoint = open_torch_dist_checkpoint(folder) if is_distributed else open_torch_checkpoint(folder)
    except (ConversionError, OSError):
        check_unchanged(folder, facts, facts)  # what is changed under the reader is not damaged
        raise
    checkpoint.facts = facts
    return checkpoint


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
        raise NotACheckpointError(f"{printable(path, most=1000)} {kind}; expected the folder of a Megatron checkpoint")
    if isinstance(path, HubPath):
        path = _only_checkpoint(path)
    if checkpoint_format(path) is not None:
        return path
    iterations = sorted(child.name for child in path.iterdir() if child.is_dir() and _is_iteration(child.name))
    tracker = path / TRACKER
    if tracker.is_file():
        with tracker.open("rb") as file:
            start = file.read(POINTER_BYTES)
        refuse_lfs_pointer(start, str(tracker), ConversionError)
        text = start[:64].decode("ascii", "replace").strip()
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
        raise NotACheckpointError(
            f"{printable(path, most=1000)} is not a Megatron checkpoint: expected mp_rank_*/model_optim_rng.pt "
            "(format torch), or .metadata, common.pt and *.distcp (format torch_dist), or iter_* folders of these; "
            f"found {found}{hint}"
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
        file = HubPath(folder.repository, PurePosixPath(name))
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
