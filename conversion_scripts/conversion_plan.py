"""What a conversion will do, before it does it: every tensor with its source, every entry left out with the reason."""

from dataclasses import asdict, dataclass
from typing import Any

from ..support.errors import size_text
from .fetch_plan import FetchPlan
from .megatron_checkpoint import Dropped, summary_of_dropped


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
            lines += [f"  {d.name}: {d.reason}{f', {size_text(d.nbytes)}' if d.nbytes else ''}" for d in self.dropped]
            lines.append("\nleft out, by reason")
            lines += [f"  {line}" for line in summary_of_dropped(self.dropped)]
        lines.append("\nNothing was written.")
        return "\n".join(lines)


def _weight_lines(weight: PlannedWeight) -> list[str]:
    lines = [f"  {weight.name} {list(weight.shape)} {size_text(weight.bytes)}"]
    for source in weight.sources:
        lines.append(f"    <- {source.name} {list(source.shape)} {source.dtype} in {', '.join(source.files) or '?'}")
    return lines
