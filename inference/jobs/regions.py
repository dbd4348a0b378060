"""Regions of a genome that users name for a job."""

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sequences.genome import Genome, open_genome
from ...sequences.intervals import Interval, parse_region, read_bed
from ...support.errors import InputError
from .job import ModelOptions


class GenomeJob:
    """A job on a genome; through pickle goes the file's name, and not the open file."""

    fasta: Path

    @functools.cached_property
    def genome(self) -> Genome:
        """The genome, opened once in each process."""
        return open_genome(self.fasta)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "genome"}


@dataclass
class RegionJob(GenomeJob):
    """The regions of a genome that a job works on.

    Args:
        fasta: the genome.
        model: which model, and how.
        regions: texts such as `chr1:1,000-2,000`.
        beds: files of further regions; without these and texts, all of the genome.
    """

    fasta: Path
    model: ModelOptions
    regions: tuple[str, ...]
    beds: tuple[Path, ...]

    @property
    def inputs(self) -> Mapping[str, Path]:
        """The files that decide the result."""
        return {"fasta": self.fasta, **inputs_of_beds(self.beds)}

    def wanted(self) -> list[Interval]:
        """The regions, sorted; those that overlap or touch are one.

        Raises:
            InputError: if a region does not lie in the genome.
        """
        return regions_of(self.genome, self.regions, self.beds)


def texts_and_beds(
    regions: Sequence[str | Path], whole_genome: bool = False
) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """What a user gave as regions: texts such as `chr1:1,000-2,000`, and BED files.

    Raises:
        InputError: if there are none, or some beside the whole genome.
    """
    if whole_genome == bool(regions):
        raise InputError(
            "expected regions or --whole-genome, and not both: a BED file, or regions such as chr9:10,000-20,000."
        )
    beds = tuple(Path(region) for region in regions if _is_file(region))
    return tuple(str(region) for region in regions if not _is_file(region)), beds


def _is_file(region: str | Path) -> bool:
    """Whether this is the name of a BED file, there or not, and no region."""
    return ".bed" in Path(region).suffixes[-2:] or Path(region).exists()


def inputs_of_beds(beds: Sequence[Path]) -> dict[str, Path]:
    """BED files among the inputs of a job."""
    return {f"regions_{number}": bed for number, bed in enumerate(beds, start=1)}


def regions_of(genome: Genome, texts: Sequence[str] = (), beds: Sequence[Path] = ()) -> list[Interval]:
    """Regions that are computed, sorted by record and start; those that overlap or touch are one, with all names.

    Args:
        genome: whose names are used, with and without `chr`.
        texts: such as `chr1:1,000-2,000`.
        beds: files of further regions; without texts and files, all contigs are regions.

    Raises:
        InputError: if a region does not lie in the genome.
    """
    wanted = [parse_region(text, genome.lengths) for text in texts]
    for bed in beds:
        wanted += read_bed(bed, genome.lengths)
    if not texts and not beds:
        wanted = [Interval(name, 0, length) for name, length in genome.contigs.items() if length]
    merged: list[tuple[str, int, int, dict[str, None]]] = []
    for record, start, end, name in sorted(
        (genome.contig(region.record), region.start, region.end, region.name) for region in wanted
    ):
        names: dict[str, None] = {}
        if merged and merged[-1][0] == record and start <= merged[-1][2]:
            _, start, last_end, names = merged.pop()
            end = max(end, last_end)
        names[name] = None
        merged.append((record, start, end, names))
    return [Interval(record, start, end, ", ".join(filter(None, names))) for record, start, end, names in merged]


class RegionFilter:
    """Whether a base lies in some regions.

    Args:
        genome: whose names the regions have.
        regions: sorted, as `regions_of` gives them.
    """

    def __init__(self, genome: Genome, regions: Sequence[Interval]):
        self._genome = genome
        self._bounds: dict[str, tuple[list[int], list[int]]] = {}
        for region in regions:
            starts, ends = self._bounds.setdefault(region.record, ([], []))
            starts.append(region.start)
            ends.append(region.end)

    def __call__(self, contig: str, position: int) -> bool:
        """Whether base `position`, counted from 0, of a contig, with or without `chr`, lies in one of the regions."""
        try:
            starts, ends = self._bounds[self._genome.contig(contig)]
        except (KeyError, InputError):  # in none of the regions, or not in the genome
            return False
        place = bisect_right(starts, position) - 1
        return place >= 0 and position < ends[place]
