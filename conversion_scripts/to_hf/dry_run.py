"""What a conversion will do, before it does it: every tensor with its source, every entry left out with the reason."""

import shutil
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...support.errors import size_text
from ...support.printable import printable
from ..files.dtypes import dtype_name
from ..hub.fetch_plan import FetchPlan
from ..mapping.match import parameters
from ..megatron.checkpoint import Dropped, summary_of_dropped
from .job import ConversionJob


@dataclass(frozen=True)
class PlannedSource:
    """A tensor that is read, and the files that hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class PlannedWeight:
    """A tensor that is written, the file it goes to, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    file: str
    sources: tuple[PlannedSource, ...]


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that has not begun.

    Args:
        files: Sizes of the weight files that are written, by name.
        bytes_written: Size of all of them.
        bytes_read: What is read of the source's tensors; the rest of its files is not touched.
        disk_free: Free bytes where the output will be; `None` if its parent folder is not there yet.
        fetch: What comes from the Hub; `None` if the source is local.
    """

    source: str
    output: str
    format: str
    iteration: int | None
    dtype: str
    parameters: int
    bytes_written: int
    bytes_read: int
    disk_free: int | None
    files: dict[str, int]
    weights: list[PlannedWeight]
    dropped: list[Dropped]
    fetch: FetchPlan | None = None

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        fields = {name: value for name, value in vars(self).items() if name != "fetch"}
        fields["weights"] = [asdict(weight) for weight in self.weights]
        fields["dropped"] = [{"name": d.name, "reason": d.reason, "bytes": d.nbytes} for d in self.dropped]
        if self.fetch is not None:
            fields["fetch"] = self.fetch.as_json()
        return fields

    def summary(self) -> str:
        """The plan for people: one line per tensor that is written and per entry that is left out."""
        step = "" if self.iteration is None else f", iteration {self.iteration}"
        free = "" if self.disk_free is None else f" ({size_text(self.disk_free)} free)"
        lines = [
            f"{self.source} ({self.format}{step}) would become {self.output}",
            f"reads {size_text(self.bytes_read)}, writes {len(self.weights)} tensors, {self.parameters:,} parameters, "
            f"{size_text(self.bytes_written)} in {self.dtype}{free}",
        ]
        if self.fetch is not None:
            lines.append(self.fetch.summary())
        for file, size in self.files.items():
            lines.append(f"\n{file} ({size_text(size)})")
            lines += [line for weight in self.weights if weight.file == file for line in _weight_lines(weight)]
        if self.dropped:
            lines.append("\nleft out")
            lines += [
                f"  {printable(d.name)}: {d.reason}{f', {size_text(d.nbytes)}' if d.nbytes else ''}"
                for d in self.dropped
            ]
            lines.append("\nleft out, by reason")
            lines += [f"  {line}" for line in summary_of_dropped(self.dropped)]
        lines.append("\nNothing was written.")
        return "\n".join(lines)


def _weight_lines(weight: PlannedWeight) -> list[str]:
    lines = [f"  {weight.name} {list(weight.shape)} {size_text(weight.bytes)}"]
    for source in weight.sources:
        lines.append(f"    <- {source.name} {list(source.shape)} {source.dtype} in {', '.join(source.files) or '?'}")
    return lines


def planned(job: ConversionJob, output: Path, limit: int, fetch: str) -> ConversionPlan:
    """The plan of a job.

    Args:
        job: The conversion.
        output: Where it would write.
        limit: Largest bytes of a weight file.
        fetch: How files on the Hub would be fetched.
    """
    tensors = job.checkpoint.tensors
    shards = job.shards(limit)
    file_of = {spec.name: name for name, shard in shards.items() for spec in shard}
    weights = []
    for spec in sorted(job.specs, key=lambda spec: spec.name):
        sources = []
        for name in dict.fromkeys(move.source for move, _ in job.outputs[spec.name].parts):
            files = tuple(sorted(job.relative_name(file) for file in tensors[name].files))
            stored = tensors[name]
            sources.append(PlannedSource(name, tuple(stored.shape), dtype_name(stored.dtype), stored.nbytes, files))
        weights.append(
            PlannedWeight(
                spec.name, spec.shape, dtype_name(spec.dtype), spec.nbytes, file_of[spec.name], tuple(sources)
            )
        )
    return ConversionPlan(
        source=str(job.checkpoint.path),
        output=str(output),
        format=job.checkpoint.format,
        iteration=job.checkpoint.iteration,
        dtype=job.dtypes,
        parameters=parameters(job.plan),
        bytes_written=job.nbytes,
        bytes_read=sum(tensors[move.source].nbytes for move in job.plan.moves),
        disk_free=shutil.disk_usage(output.parent).free if output.parent.is_dir() else None,
        files={name: sum(spec.nbytes for spec in shard) for name, shard in shards.items()},
        weights=weights,
        dropped=job.dropped,
        fetch=job.fetch_plan(fetch, job.sources(list(chain.from_iterable(shards.values())))),
    )
