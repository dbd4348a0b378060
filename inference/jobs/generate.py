"""`gengram generate`: new sequences, behind prompts or from nothing, as FASTA."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ...sequences.alphabet import check_letters
from ...sequences.fasta import read_fasta
from ...sequences.fasta_output import check_fasta_output, fasta_output
from ...support.errors import shortened
from ...support.input_file import shown_name
from ...support.whole_output import write_whole
from ..generation import BaseGenerator, Sampling, random_draws
from ..loaded_model import head_of
from .job import JobChunk, ModelOptions, Worker
from .run import JobSummary, run_job
from .tables import record_place

WITHOUT_PROMPT = "generated"  # what sequences are named that continue no prompt

_SCHEMA = pa.schema([("name", pa.string()), ("description", pa.string()), ("sequence", pa.string())])


class _Wanted(NamedTuple):
    """One sequence to be made."""

    prompt_name: str
    prompt: str
    sample: int  # from 1


@dataclass(frozen=True)
class GenerateJob:
    """Sequences that a causal model makes.

    Args:
        model: which model and how.
        prompts: FASTA of sequences to continue; None starts from nothing.
        number: sequences for each prompt.
        length: new bases of each.
        sampling: how bases are drawn.
        seed: of the random numbers.
        with_prompt: whether a prompt stands in front of its new bases.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    prompts: Path | None = None
    number: int = 1
    length: int = 1000
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    with_prompt: bool = True
    name: str = "generate"
    unit: str = "bp"

    def __post_init__(self) -> None:
        for name, least in (("number", 1), ("length", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}.")

    @property
    def inputs(self) -> dict[str, Path]:
        """The prompts, if there are any."""
        return {} if self.prompts is None else {"prompts": self.prompts}

    def settings(self) -> dict[str, Any]:
        """The options that decide the sequences."""
        return {
            "number": self.number,
            "length": self.length,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "seed": self.seed,
            "with_prompt": self.with_prompt,
            "chunks_by_batch_tokens": self.model.batch_tokens,
            "beyond_the_context": "from half of the context on, which moves by half of it",
        }

    def chunks(self) -> Iterator[JobChunk]:
        """Sequences that are made side by side: they fit into a batch, and their prompts end near one another."""
        chunk: list[_Wanted] = []
        shortest = longest = 0
        for wanted in self._wanted():
            size = len(wanted.prompt)
            low, high = (min(shortest, size), max(longest, size)) if chunk else (size, size)
            is_too_long = (len(chunk) + 1) * (high + self.length) > self.model.batch_tokens
            if chunk and (is_too_long or high - low > self.length):
                yield JobChunk(len(chunk) * self.length, chunk)
                chunk, low, high = [], size, size
            chunk.append(wanted)
            shortest, longest = low, high
        if chunk:
            yield JobChunk(len(chunk) * self.length, chunk)

    def _wanted(self) -> Iterator[_Wanted]:
        prompts = [(WITHOUT_PROMPT, "")] if self.prompts is None else read_fasta(self.prompts)
        for name, prompt in prompts:
            check_letters(prompt, f"{shown_name(self.prompts or '')}, record {shortened(name)}")
            for sample in range(1, self.number + 1):
                yield _Wanted(name, prompt, sample)

    def worker(self, device: str | None) -> Worker:
        """The model, as a function of what is wanted."""
        loaded = self.model.load("causal", device)
        generator = BaseGenerator(loaded.model, loaded.tokenizer, self.sampling)

        def generate(chunk: list[_Wanted]) -> pa.Table:
            draws = [random_draws(self.seed, each.prompt_name, each.sample, self.length) for each in chunk]
            found = generator.continued([each.prompt for each in chunk], np.stack(draws))
            rows = [self._row(each, bases) for each, bases in zip(chunk, found, strict=True)]
            return pa.Table.from_pylist(rows, schema=_SCHEMA)

        return generate

    def _row(self, wanted: _Wanted, bases: str) -> dict[str, str]:
        words = [f"new_bases={self.length}", f"seed={self.seed}"]
        if self.prompts is not None:
            words = [f"prompt={wanted.prompt_name}", f"prompt_bases={len(wanted.prompt)}", *words]
        sequence = wanted.prompt + bases if self.with_prompt else bases
        return {
            "name": f"{wanted.prompt_name}_{wanted.sample}",
            "description": " ".join(words),
            "sequence": sequence,
        }

    def beside(self, output: Path) -> list[Path]:
        """How the sequences were made."""
        return [record_place(output)]

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """The FASTA file, and beside it how it was made."""
        with fasta_output(output) as fasta:
            for table in results:
                for row in table.to_pylist():
                    fasta.begin(row["name"], row["description"])
                    fasta.add(row["sequence"])
        write_whole(record_place(output), json.dumps(record, indent=2) + "\n")


def generate_file(output: str | Path, prompts: str | Path | None = None, **options: Any) -> JobSummary:
    """Write generated sequences to a FASTA file: one call for all that `gengram generate` does.

    Args:
        output: a name that ends in `.fa`, `.fasta` or `.fna`, or one of these and `.gz`. How it was made goes to
            `OUTPUT.json`.
        prompts: FASTA of sequences to continue.
        options: those of `GenerateJob`; and `engine`, `shard`, `restart` and `progress`, as `run_job` has them.

    Raises:
        ValueError: if the prompts, the model or an option cannot be used.
        OSError: if a file cannot be read or written.
    """
    names = ("engine", "shard", "restart", "progress")
    running = {name: options.pop(name) for name in names if name in options}
    check_fasta_output(Path(output))
    job = GenerateJob(prompts=None if prompts is None else Path(prompts), **options)
    if head_of(job.model.load_config()) == "masked":
        raise ValueError(
            f"{job.model.model} predicts masked bases from both sides, so it cannot continue a sequence; expected a "
            "causal model, which predicts the next base."
        )
    return run_job(job, output, **running)
