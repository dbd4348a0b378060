"""What an interrupted conversion left: whether it is this one, what of it is right, what is still to be read."""

from collections.abc import Container
from typing import Any

from tqdm import tqdm

from ...support.versions import installed_version
from ..files.dtypes import dtype_name
from ..files.partial_folder import FinishedFile, FinishedPart, PartialFolder
from ..files.safetensors_writer import StartedFile, TensorSpec, intact_start, shard_is_intact
from ..mapping.quantized import numbers_name
from ..mapping.weight_table import TABLE_VERSION
from .expert_pieces import slices_there
from .job import ConversionJob


def identity_of(job: ConversionJob, limit: int) -> dict[str, Any]:
    """What decides the bytes of the output: an unfinished conversion is continued only if all of it is the same."""
    return {
        "source": str(job.checkpoint.path.resolve()),
        "source files": [[str(file), *job.checkpoint.facts.get(file, ())] for file in job.checkpoint.files],
        "dtype": dtype_name(job.dtype),
        "quantised": job.kinds._asdict(),
        "max_shard_size": limit,
        "version of gengram": installed_version("gengram"),
        "table_version": TABLE_VERSION,
    }


def intact_files(
    job: ConversionJob, place: PartialFolder, shards: dict[str, list[TensorSpec]], progress: bool
) -> dict[str, FinishedFile]:
    """The weight files of an earlier run whose bytes have the hashes in its journal."""
    entries = {
        name: entry
        for name, entry in place.finished.items()
        if name in shards and set(entry.sources) == set(job.sources(shards[name]))
    }
    total = sum(spec.nbytes for name in entries for spec in shards[name])
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=not (progress and entries)) as bar:
        return {
            name: entry
            for name, entry in entries.items()
            if shard_is_intact(place.folder / name, shards[name], entry.tensors, bar.update)
        }


def intact_parts(
    job: ConversionJob, place: PartialFolder, shards: dict[str, list[TensorSpec]], progress: bool
) -> tuple[dict[str, StartedFile], list[FinishedPart]]:
    """How far the weight file that an earlier run was writing is right, and the notes of these parts."""
    name = place.parts[0].file if place.parts else ""
    known = {spec.name for spec in shards.get(name, ())}
    fitting = [
        part
        for part in place.parts
        if part.tensor in known and set(part.sources) == set(job.sources_of(part.tensor, part.index))
    ]
    if not fitting or len(fitting) < len(place.parts):
        return {}, []
    tensors = {part.tensor: part.sha256 for part in place.parts if part.index is None}
    slices: dict[str, list[str]] = {}
    for part in place.parts:
        if part.index is not None and part.index == len(slices.setdefault(part.tensor, [])):
            slices[part.tensor].append(part.sha256)
    with tqdm(unit="B", unit_scale=True, desc="checking", disable=not progress) as bar:
        start = intact_start(place.folder / name, shards[name], tensors, slices, bar.update)
    if not start.nbytes:
        return {}, []
    following = shards[name][len(start.tensors)].name if len(start.tensors) < len(shards[name]) else ""
    parts = [
        part
        for part in place.parts
        if part.tensor in start.tensors
        or (part.tensor == following and part.index is not None and part.index < len(start.slices))
    ]
    return {name: start}, parts


def to_be_read(
    job: ConversionJob, shards: dict[str, list[TensorSpec]], kept: Container[str], started: dict[str, StartedFile]
) -> list[str]:
    """The tensors of the source that what is still to be written needs, in the order of their use, once for each.

    Scales are made together with their numbers; for those whose numbers an earlier run wrote, experts are read again.
    """
    names: list[str] = []
    there = slices_there(shards, kept, started)
    for name, shard in shards.items():
        if name in kept:
            continue
        start = started.get(name, StartedFile())
        for place, spec in enumerate(shard[len(start.tensors) :]):
            numbers = numbers_name(spec.name)
            last = None if numbers is None else there.get(numbers, 0)
            names += job.sources([spec])[len(start.slices) if place == 0 else 0 : last]
    return names
