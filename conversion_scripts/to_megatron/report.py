"""What a conversion to Megatron did, in words."""

from dataclasses import dataclass
from pathlib import Path

from ...support.errors import size_text


@dataclass
class BackReport:
    """What a conversion to Megatron did.

    Args:
        zeros: How many tensors were filled with zeros: memory of layers where it is not active.
        recorded: Whether the arguments of the original checkpoint were used, from `conversion.json`.
        contradiction: Why they were not, if there are any.
        unchecked: How many tensors of the folder have no recorded hash to be compared with.
    """

    source: Path
    output: Path
    format: str
    iteration: str
    dtype: str
    stages: int
    tensor_ranks: int
    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    zeros: int
    zero_bytes: int
    prefix: str
    recorded: bool
    contradiction: str = ""
    unchecked: int = 0

    def summary(self) -> str:
        """The report in a few lines for people."""
        ranks = f", {self.stages} pipeline stage(s), {self.tensor_ranks} tensor rank(s)"
        lines = [
            f"Converted {self.source} to {self.output} ({self.format}{ranks if self.format == 'torch' else ''}, "
            f"{self.iteration}) in {self.seconds:.1f} s.",
            f"Wrote {self.tensors} tensors, {self.parameters:,} parameters, {size_text(self.nbytes)} in {self.dtype}; "
            f"the memory is called {self.prefix}.",
            "Arguments: those of the original checkpoint, where they are recorded."
            if self.recorded
            else "Arguments: made from config.json.",
        ]
        if self.contradiction:
            lines.append(f"The recorded arguments were not used: {self.contradiction}.")
        if self.unchecked:
            lines.append(
                f"Not compared with hashes: {self.unchecked} tensors, because no conversion.json has theirs; damage "
                "of the folder's files would not be noticed."
            )
        if self.zeros:
            lines.append(
                f"Filled {self.zeros} tensors with zeros ({size_text(self.zero_bytes)}): memory of layers where it is "
                "not active, which Megatron loads and does not use."
            )
        return "\n".join(lines)
