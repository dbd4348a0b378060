"""What a job is: an input cut into chunks, a worker that computes one, and an output made of their results."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch

from ...support.default_model import DEFAULT_MODEL
from ..base_tokens import BaseTokens
from ..embeddings import context_of
from ..loaded_model import UNKNOWN_CONTEXT, LoadedModel, context_length, load_config, load_model, load_tokenizer

STRANDS = ("both", "forward", "reverse")
DTYPES = ("float32", "bfloat16", "float16")


class JobChunk(NamedTuple):
    """A piece of the input that is computed, stored and repeated as a whole."""

    size: int  # in the job's unit, for progress
    content: Any  # what the worker needs; goes through pickle
    continues: bool = False  # whether its result is joined with that of the chunk before: a part holds both or none


Worker = Callable[[Any], pa.Table]  # from a chunk's content to its result


class Job(Protocol):
    """A job. It goes through pickle to other processes, so it holds paths and options, no open files and no model."""

    @property
    def name(self) -> str:
        """Of the command: "score"."""

    @property
    def unit(self) -> str:
        """What progress counts: "variant", "bp"."""

    @property
    def model(self) -> "ModelOptions":
        """Which model, and how it is used."""

    @property
    def inputs(self) -> Mapping[str, Path]:
        """Files that decide the result, by role: {"variants": ..., "fasta": ...}."""

    def settings(self) -> dict[str, Any]:
        """The job's own options that decide the result, as JSON; a run is continued only with equal ones."""

    def chunks(self) -> Iterator[JobChunk]:
        """The input in a fixed order and in fixed pieces, read as a stream.

        It is read twice, first to check and count, so that wrong input is reported before the work, not after it.
        """

    def worker(self, device: str | None) -> Worker:
        """Load the model; what is returned computes one chunk after another.

        If it has an attribute `advance`, that is set to a function, to be called with the units that are done inside a
        chunk, for progress; nobody need do so.

        Args:
            device: where to run.
        """

    def beside(self, output: Path) -> list[Path]:
        """Files that `write` may make beside `output`, such as an index or the record; they must not exist, either."""

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Write the output from the results of all chunks in their order, each read when it is asked for.

        Args:
            results: of the chunks; every loop over them reads them again.
            output: a path that does not exist yet; what appears there, and `beside` it, is published as a whole.
            record: of the run, to be kept in the output.
        """


@dataclass(frozen=True)
class ModelOptions:
    """Which model a job uses and how: the options that all commands share.

    Args:
        model: folder or Hub id; gengram-mini, which ships with the package, by default.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights and activations: float32, bfloat16 or float16.
        device: cpu, cuda, cuda:1, ...; by default the first GPU if there is one.
        batch_tokens: most tokens, padding included, that the model reads at once.
        strands: "both" (the mean of the two), "forward" or "reverse".
        trust_remote_code: whether code that a model's folder brings may run.

    Raises:
        ValueError: for other values.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    dtype: str = "float32"
    device: str | None = None
    batch_tokens: int = 16384
    strands: str = "both"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (("strands", self.strands, STRANDS), ("dtype", self.dtype, DTYPES)):
            if value not in allowed:
                raise ValueError(f"{name}: expected {', '.join(allowed)}, got {value!r}.")
        if isinstance(self.batch_tokens, bool) or not isinstance(self.batch_tokens, int) or self.batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected a whole number of at least 1, got {self.batch_tokens!r}.")

    def load(self, head: str | None, device: str | None = None) -> LoadedModel:
        """The model with this head (see `load_model`)."""
        return load_model(
            self.model,
            head,
            getattr(torch, self.dtype),
            device or self.device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def load_config(self) -> Any:
        """The model's configuration alone, to check options by."""
        return load_config(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load_commit(self) -> str | None:
        """The commit of a model on the Hub, or of one there that a folder of adapters is of; None of other models."""
        return getattr(self.load_config(), "_commit_hash", None)

    def load_tokenizer(self) -> Any:
        """The model's tokenizer alone."""
        return load_tokenizer(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def bases_at_once(self, context: int | None = None, unknown: int | None = None) -> int:
        """`context`, or as many bases as the model can read at once, or `unknown` if nothing says how many that are.

        Raises:
            ValueError: if it is more than that, or nothing says how many that are.
        """
        tokenizer = self.load_tokenizer()
        most_tokens = context_length(self.load_config(), tokenizer)
        if context is None and most_tokens >= UNKNOWN_CONTEXT:
            if unknown is not None:
                return unknown
            raise ValueError(
                f"neither configuration nor tokenizer of {self.model} says how many bases it reads at once; give the "
                "length that it was trained with as --context."
            )
        return context_of(most_tokens, BaseTokens.of(tokenizer), context)

    def settings(self) -> dict[str, Any]:
        """What is recorded of them: all but the device. Of `batch_tokens` numbers depend by rounding only."""
        return {name: value for name, value in asdict(self).items() if name != "device"}
