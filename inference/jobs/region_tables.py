"""What jobs have in common that make a table of regions of a genome."""

from dataclasses import dataclass
from pathlib import Path

from .job import Job
from .record import differences, record_of
from .regions import RegionJob
from .run import JobSummary
from .tables import record_of_table

DIGITS = 7  # that mean something: the model computes in float32 at best


@dataclass
class RegionTableJob(RegionJob):
    """A job that makes a table.

    Args:
        output: the table, `.tsv` or `.parquet`.
    """

    output: Path


def finished_table(job: Job, output: Path) -> JobSummary | None:
    """What the run did that made `output`, if it was a run of this very job."""
    stored = record_of_table(output)
    if stored is None or differences(stored, record_of(job)):
        return None
    return JobSummary(output, sum(chunk.size for chunk in job.chunks()), 0, True, stored)


def rounded(number: float | None) -> float | None:
    """A number with the digits that mean something."""
    return None if number is None else float(f"{number:.{DIGITS}g}")
