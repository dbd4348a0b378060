"""`gengram track`: values for every base of regions or whole genomes, as files that genome browsers read."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...sequences.alphabet import check_letters
from ...sequences.genome import Genome
from ...support.default_model import model_name
from ...support.errors import InputError
from ...support.whole_output import write_whole
from ..base_tokens import BaseTokens
from ..loaded_model import head_of
from ..long_sequences import checked_overlap
from ..tracks import OF_MEMORY, PREDICTED, UNITS, VALUES, Track, TrackModel, tracks_of
from .job import JobChunk, ModelOptions, Worker
from .record import differences, record_of
from .regions import RegionJob, texts_and_beds
from .run import JobSummary
from .track_files import FORMATS, TrackWriter

LONGEST_CHUNK = 1 << 18  # bases
WINDOWS_PER_CHUNK = 64  # of each strand; where chunks meet, one of them is read twice


@dataclass
class TrackJob(RegionJob):
    """Tracks of regions of a genome; make it with `track_job`.

    Args:
        tracks: what is computed.
        is_masked: whether the model predicts masked bases.
        context, overlap: how the model reads long sequences, see `long_sequences`.
        format: bigwig or bedgraph.
        chunk: bases that are computed and stored as a whole; they do not change the values.
    """

    tracks: tuple[Track, ...]
    is_masked: bool
    context: int
    overlap: int
    format: str = "bigwig"
    chunk: int = LONGEST_CHUNK
    name: str = "track"
    unit: str = "bp"

    def settings(self) -> dict[str, Any]:
        return {
            "regions": list(self.regions),
            "tracks": [track.name for track in self.tracks],
            "context": self.context,
            "overlap": self.overlap,
            "format": self.format,
            "chunk": self.chunk,
        }

    def chunks(self) -> Iterator[JobChunk]:
        genome = self.genome
        for region in self.wanted():
            where = f"{genome.name}, record {region.record}"
            for start in range(region.start, region.end, self.chunk):
                end = min(start + self.chunk, region.end)
                first, last = _read_for(start, end, self.context, genome.contigs[region.record])
                check_letters(genome.fetch(region.record, first, last), where, first)
                yield JobChunk(end - start, (region.record, start, end))

    def worker(self, device: str | None) -> Worker:
        loaded = self.model.load(head_of(self.model.load_config()), device)
        loaded.model.config.use_cache = False
        values = tuple(dict.fromkeys(track.value for track in self.tracks))
        tokens = BaseTokens.of(loaded.tokenizer)
        options = (self.model.strands, self.context, self.overlap, self.model.batch_tokens)
        return _Worker(TrackModel(loaded.model, tokens, self.is_masked, values, *options), self.genome)

    def beside(self, output: Path) -> list[Path]:
        """Nothing: all is in the folder."""
        return []

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        contigs = {name: self.genome.contigs[name] for name in sorted(self.genome.contigs)}
        output.mkdir()
        files = {track.name: f"{track.name}.{FORMATS[self.format].suffix}" for track in self.tracks}
        with contextlib.ExitStack() as stack:
            writers: dict[str, TrackWriter] = {
                name: stack.enter_context(FORMATS[self.format](output / file, contigs)) for name, file in files.items()
            }
            for result in results:
                place = json.loads(result.schema.metadata[b"place"])
                for name, writer in writers.items():
                    writer.add(place["record"], place["start"], result[name].to_numpy())
        described = [
            {"file": files[track.name], **track._asdict(), "unit": UNITS[track.value]} for track in self.tracks
        ]
        write_whole(output / "record.json", json.dumps({**record, "tracks": described}, indent=2) + "\n")


class _Worker:
    """A model and a genome, as a function of regions."""

    def __init__(self, model: TrackModel, genome: Genome):
        self.model, self.genome = model, genome
        self.advance: Callable[[int], Any] = lambda bases: None

    def __call__(self, content: tuple[str, int, int]) -> pa.Table:
        record, start, end = content
        length = self.genome.contigs[record]
        first, last = _read_for(start, end, self.model.context, length)
        letters = self.genome.fetch(record, first, last)
        values = self.model.of_part(lambda a, b: letters[a - first : b - first], length, start, end, self.advance)
        place = json.dumps({"record": record, "start": start})
        return pa.table(values).replace_schema_metadata({"place": place})


def _read_for(start: int, end: int, context: int, length: int) -> tuple[int, int]:
    """The part of a record of so many bases that windows of the bases `start` to `end` may hold."""
    return max(0, start - context), min(length, end + context)


def track_job(
    fasta: str | Path,
    model: ModelOptions,
    regions: Sequence[str | Path] = (),
    whole_genome: bool = False,
    values: Sequence[str] | None = None,
    context: int | None = None,
    overlap: int | None = None,
    format: str = "bigwig",
) -> TrackJob:
    """A job that `run_job` runs.

    Args:
        fasta: the genome.
        model: which model, and how.
        regions: BED files, and texts such as `chr1:1,000-2,000`.
        whole_genome: all of it, instead of regions.
        values: of `VALUES`; by default all that the model has.
        context: bases that the model reads at once; by default as many as it can.
        overlap: bases that two windows share; half the context by default.
        format: bigwig or bedgraph.

    Raises:
        ValueError: if a value or option does not fit the model.
        OSError: if there is no such model.
    """
    if format not in FORMATS:
        raise InputError(f"--format: expected {' or '.join(FORMATS)}, got {format!r}.")
    texts, beds = texts_and_beds(regions, whole_genome)
    config = model.load_config()
    tokens, head = BaseTokens.of(model.load_tokenizer()), head_of(config)
    name, memory_layers = model_name(model.model), getattr(config, "memory_layers", None) or []
    values = _checked_values(values, name, head, memory_layers)
    if head == "masked" and tokens.mask is None and set(values) & set(PREDICTED):
        raise InputError(f"{name}: expected a tokenizer with a mask token, which its masked model needs.")
    context = model.bases_at_once(context)
    overlap = checked_overlap(context, overlap)
    return TrackJob(
        Path(fasta),
        model,
        texts,
        beds,
        tuple(tracks_of(values, model.strands, memory_layers)),
        head == "masked",
        context,
        overlap,
        format,
        min(LONGEST_CHUNK, max(context, WINDOWS_PER_CHUNK * (context - overlap))),
    )


def finished_tracks(job: TrackJob, output: Path) -> JobSummary | None:
    """What the run did that made `output`, if it was a run of this very job."""
    try:
        stored = json.loads((output / "record.json").read_text())
    except (OSError, ValueError):
        return None
    record = record_of(job)
    if not isinstance(stored, dict) or differences({**record, "tracks": stored.get("tracks")}, stored):
        return None
    return JobSummary(output, sum(chunk.size for chunk in job.chunks()), 0, True, record)


def _checked_values(
    values: Sequence[str] | None, name: str, head: str | None, memory_layers: Sequence[int]
) -> list[str]:
    """The values that are asked for, or all that there are, each once and in the order of `VALUES`."""
    unknown = [value for value in values or () if value not in VALUES]
    if unknown or (values is not None and not values):
        raise InputError(f"--values: expected some of {','.join(VALUES)}, got {','.join(unknown) or 'none'}.")
    lacking: dict[str, str] = {}
    if head is None:
        why = "its configuration names no causal or masked language model"
        lacking |= dict.fromkeys(PREDICTED, why)
    if not memory_layers:
        lacking |= dict.fromkeys(OF_MEMORY, "it has no memory; only Gengram models do")
    for value in values or ():
        if value in lacking:
            raise InputError(f"--values: {name} gives no {value}, since {lacking[value]}.")
    found = [value for value in VALUES if value in (values or VALUES) and value not in lacking]
    if not found:
        raise InputError(f"{name} gives no tracks: {lacking['surprisal']}, and {lacking['gate']}.")
    return found
