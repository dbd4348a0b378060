"""`gengram mutate --dependency`: how much each base of a region decides what a model predicts at each other one."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...support.default_model import model_name
from ...support.errors import InputError
from ..dependencies import DependencyModel
from ..loaded_model import LoadedModel, head_of
from ..memory_use import fast_memory
from ..mutations import Block, shared_window
from .job import JobChunk, ModelOptions, Worker
from .mutate import DEFAULT_CONTEXT, window_sizes
from .region_tables import RegionTableJob, rounded
from .regions import texts_and_beds
from .tables import beside_table, check_table_output, write_table

SCHEMA = pa.schema(
    [
        ("chrom", pa.string()),
        ("i", pa.int64()),
        ("j", pa.int64()),
        *((name, pa.float64()) for name in ("dependency", "dependency_forward", "dependency_reverse")),
    ]
)
_BASES_PER_CHUNK = 32


@dataclass
class DependencyJob(RegionTableJob):
    """Nucleotide dependencies within regions; make it with `dependency_job`.

    Args:
        is_masked: whether the model predicts masked bases.
        context: bases of the window around a region.
    """

    is_masked: bool
    context: int
    name: str = field(default="mutate", init=False)
    unit: str = field(default="bp", init=False)

    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {"regions": list(self.regions), "context": self.context, "dependency": True}

    def chunks(self) -> Iterator[JobChunk]:
        """Some bases at a time, each on all others of its region.

        Raises:
            InputError: if a region does not lie in the genome, or in a window.
        """
        for region in self.wanted():
            if len(region) > self.context:
                raise InputError(
                    f"region {region}: expected at most {self.context:,} bases, so that each pair is read at once, "
                    f"got {len(region):,}; give a shorter region, or a larger --context."
                )
            for start in range(region.start, region.end, _BASES_PER_CHUNK):
                end = min(start + _BASES_PER_CHUNK, region.end)
                yield JobChunk(end - start, (region.record, Block(region.start, region.end), start, end))

    def worker(self, device: str | None) -> Worker:
        """Load the model, and open the genome."""
        return DependencyWorker(self, device)

    def beside(self, output: Path) -> list[Path]:
        """The record of a TSV."""
        return beside_table(output)

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Write the table."""
        write_table(results, output, record, SCHEMA)


class DependencyWorker:
    """Computes chunks of a `DependencyJob`.

    Args:
        job: the job.
        device: where the model runs.
        loaded: the job's model, if it is there already.
    """

    def __init__(self, job: DependencyJob, device: str | None, loaded: LoadedModel | None = None):
        self._job = job
        loaded = loaded or job.model.load("masked" if job.is_masked else "causal", device)
        self._model = DependencyModel(
            loaded.model, loaded.tokenizer, job.model.strands, job.is_masked, job.model.batch_tokens
        )
        self._fast = contextlib.ExitStack()  # as long as this object
        self._fast.enter_context(fast_memory(loaded.model))

    def __call__(self, content: tuple[str, Block, int, int]) -> pa.Table:
        contig, region, start, end = content
        genome = self._job.genome
        first, last = shared_window(region, genome.contigs[contig], self._job.context)
        found = self._model.of(genome.fetch(contig, first, last), range(start - first, end - first))
        inside = slice(region.start - first, region.end - first)
        numbers = [None if part is None else part[:, inside] for part in (found.mean(), *found)]
        return pa.Table.from_pylist(list(_rows(contig, start, region.start, numbers)), schema=SCHEMA)


def _rows(contig: str, first_i: int, first_j: int, numbers: Sequence[np.ndarray | None]) -> Iterator[dict[str, Any]]:
    """A row for each pair that has a value."""
    mean = numbers[0]
    assert mean is not None
    for i, j in itertools.product(*map(range, mean.shape)):
        if np.isnan(mean[i, j]):
            continue
        values = [None if part is None or np.isnan(part[i, j]) else rounded(float(part[i, j])) for part in numbers]
        yield {
            "chrom": contig,
            "i": first_i + i + 1,
            "j": first_j + j + 1,
            **dict(zip(SCHEMA.names[3:], values, strict=True)),
        }


def dependency_job(
    fasta: str | Path,
    output: str | Path,
    regions: Sequence[str | Path] = (),
    *,
    whole_genome: bool = False,
    model: ModelOptions | None = None,
    context: int | None = None,
) -> DependencyJob:
    """The job of `gengram mutate --dependency`, for `run_job(job, job.output)`.

    Args:
        fasta: the genome.
        output: the table, `.tsv` or `.parquet`.
        regions: texts such as `chr1:1,000-2,000`, and BED files.
        whole_genome: all of the FASTA file, instead of regions.
        model: which model, and how.
        context: bases of the window around each region; by default 512 or, if that is less, what the model reads.

    Raises:
        ValueError: if a value or option does not fit the model.
        OSError: if there is no such model.
    """
    model = model or ModelOptions()
    check_table_output(Path(output))
    texts, beds = texts_and_beds(regions, whole_genome)
    config, name = model.load_config(), model_name(model.model)
    head = head_of(config)
    if head is None:
        raise InputError(f"--dependency: {name} is no causal or masked language model by its configuration.")
    context, _ = window_sizes(model, config, context, DEFAULT_CONTEXT)
    assert context is not None
    return DependencyJob(Path(fasta), model, texts, beds, Path(output), head == "masked", context)
