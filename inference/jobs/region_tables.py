"""What jobs have in common that make a table of regions of a genome."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sequences.genome import Genome, open_genome
from ...sequences.intervals import Interval
from .job import Job, ModelOptions
from .record import differences, record_of
from .run import JobSummary
from .tables import record_of_table
from .track import regions_of

DIGITS = 7  # that mean something: the model computes in float32 at best


@dataclass
class RegionTableJob:
    """The regions of a genome that a job works on.

    Args:
        fasta: the genome.
        output: the table, `.tsv` or `.parquet`.
        model: which model, and how.
        regions: texts such as `chr1:1,000-2,000`.
        beds: files of further regions; without these and texts, all of the genome.
    """

    fasta: Path
    output: Path
    model: ModelOptions
    regions: tuple[str, ...]
    beds: tuple[Path, ...]

    @property
    def inputs(self) -> Mapping[str, Path]:
        """The files that decide the result."""
        return {"fasta": self.fasta, **{f"regions_{number}": bed for number, bed in enumerate(self.beds, start=1)}}

    @functools.cached_property
    def genome(self) -> Genome:
        """The genome, opened once in each process."""
        return open_genome(self.fasta)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "genome"}

    def wanted(self) -> list[Interval]:
        """The regions, sorted; those that overlap or touch are one.

        Raises:
            InputError: if a region does not lie in the genome.
        """
        return regions_of(self.genome, self.regions, self.beds)


def finished_table(job: Job, output: Path) -> JobSummary | None:
    """What the run did that made `output`, if it was a run of this very job."""
    stored = record_of_table(output)
    if stored is None or differences(stored, record_of(job)):
        return None
    return JobSummary(output, sum(chunk.size for chunk in job.chunks()), 0, True, stored)


def rounded(number: float | None) -> float | None:
    """A number with the digits that mean something."""
    return None if number is None else float(f"{number:.{DIGITS}g}")
