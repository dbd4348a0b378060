"""What a conversion to Hugging Face did, in JSON and in words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...support.errors import quoted, size_text
from ..hub.hub_path import SourcePath
from ..megatron.checkpoint import Dropped, summary_of_dropped


@dataclass
class ConversionReport:
    """What a conversion did.

    Args:
        fetched: Bytes from the Hub, metadata included; `None` if the source was local.
        unchecked: Tensors of the checkpoint whose bytes could not be compared with a checksum, with the reason.
    """

    source: SourcePath
    output: Path
    format: str
    iteration: int | None
    dtype: str
    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    fetched: int | None = None
    unchecked: dict[str, str] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        fields = {**vars(self), "source": str(self.source), "output": str(self.output)}
        fields["dropped"] = [{"name": d.name, "reason": d.reason, "bytes": d.nbytes} for d in self.dropped]
        return fields

    def summary(self) -> str:
        """The report in a few lines for people."""
        step = "" if self.iteration is None else f", iteration {self.iteration}"
        lines = [
            f"Converted {self.source} ({self.format}{step}) to {self.output} in {self.seconds:.1f} s.",
            f"Kept {self.tensors} tensors, {self.parameters:,} parameters, {size_text(self.nbytes)} in {self.dtype}.",
        ]
        if self.fetched is not None:
            lines.append(f"Fetched {size_text(self.fetched)}.")
        for reason in dict.fromkeys(self.unchecked.values()):
            names = [name for name, why in self.unchecked.items() if why == reason]
            lines.append(
                f"Not compared with checksums: {len(names)} tensors, because {reason} ({quoted(names, limit=1)})."
            )
        if self.dropped:
            lines.append("Left out:")
            lines += [f"  {line}" for line in summary_of_dropped(self.dropped)]
        return "\n".join(lines)
