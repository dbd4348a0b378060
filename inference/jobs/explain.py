"""`gengram explain`: which k-mers of the memory made what a model does in a region, as tables and one report."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from ...motif_memory.ways.kept_fold import memories_of
from ...sequences.alphabet import check_letters, reverse_complement
from ...sequences.annotation import Gene
from ...sequences.intervals import Interval
from ...support.errors import InputError, quoted
from ...support.whole_output import write_whole
from ..base_tokens import BaseTokens
from ..class_effects import ClassEffects
from ..embeddings import STRANDS
from ..explanation import Explanation, explain_targets, memories_by_layer
from ..kmer_totals import KmerTotals
from ..knock_out import kmers_to_knock_out, knocked_out, spelled_kmers
from ..loaded_model import LoadedModel
from ..long_sequences import checked_overlap
from ..motif_matches import known_motifs
from ..mutations import Block, region_blocks, shared_window
from ..tracks import OF_MEMORY, VALUES, TrackModel
from .dependency import SCHEMA as DEPENDENCY_SCHEMA
from .dependency import DependencyJob, DependencyWorker
from .explain_model import no_memory, says_memory
from .job import JobChunk, ModelOptions, Worker
from .mutate import CLASSES, MutateJob, MutateWorker, mutate_job
from .region_tables import RegionTableJob
from .track_picture import read_genes_of

LONGEST = 1_000  # bases of a region: a picture of its letters is still read
LONGEST_MATRIX = 200  # of which dependencies are computed
MOST_REGIONS = 50

_PLACE = [("chrom", pa.string()), ("strand", pa.string()), ("layer", pa.string())]
SCHEMAS = {
    "bases": pa.schema(
        [
            ("chrom", pa.string()),
            ("pos", pa.int64()),
            ("ref", pa.string()),
            ("strand", pa.string()),
            ("layer", pa.string()),
            ("value", pa.string()),
            ("number", pa.float64()),
        ]
    ),
    "contributions": pa.schema(
        [
            *_PLACE,
            ("target", pa.string()),
            ("pos", pa.int64()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("kmer", pa.string()),
            ("contribution", pa.float64()),
        ]
    ),
    "kmers": pa.schema(
        [
            ("layer", pa.string()),
            ("target", pa.string()),
            ("kmer", pa.string()),
            ("regions", pa.int64()),
            ("occurrences", pa.int64()),
            ("contribution", pa.float64()),
        ]
    ),
    "knock_out": pa.schema(
        [
            ("chrom", pa.string()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("strand", pa.string()),
            ("value", pa.string()),
            ("before", pa.float64()),
            ("after", pa.float64()),
        ]
    ),
    "dependencies": DEPENDENCY_SCHEMA,
}


@dataclass
class ExplainJob(RegionTableJob):
    """What the memory's k-mers do in regions of a genome; make it with `explain_job`.

    Args:
        changes: the job that changes every base of the regions.
        gtf: genes for the pictures.
        targets: of `explain_memory`.
        knock_out: k-mers whose rows are zeroed for a comparison.
        reverse_complements: whether those of the k-mers are, too.
        mutates: whether every base is changed, which takes longest.
        jaspar: the tax group of the motifs that k-mers are compared with, `all`, or None for no comparison.
    """

    changes: MutateJob
    targets: tuple[str, ...]
    gtf: Path | None = None
    knock_out: tuple[str, ...] = ()
    reverse_complements: bool = False
    mutates: bool = True
    jaspar: str | None = None
    name: str = field(default="explain", init=False)
    unit: str = field(default="bp", init=False)

    @property
    def inputs(self) -> dict[str, Path]:
        """The files that decide the result."""
        return {**super().inputs, **({} if self.gtf is None else {"gtf": self.gtf})}

    @property
    def is_classifier(self) -> bool:
        """Whether a class is explained, and not a prediction of bases."""
        return self.changes.head == CLASSES

    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {
            **self.changes.settings(),
            "targets": list(self.targets),
            "knock_out": list(self.knock_out),
            "reverse_complements": self.reverse_complements,
            "mutates": self.mutates,
            "jaspar": self.jaspar,
        }

    def chunks(self) -> Iterator[JobChunk]:
        """A region at a time.

        Raises:
            InputError: if a region does not lie in the genome or is too long, or there are too many.
        """
        wanted = self.wanted()
        empty = [name for name, length in self.genome.contigs.items() if not length]
        if empty and not (self.regions or self.beds):
            raise InputError(
                f"{self.genome.name}: expected bases in every record, got none in {quoted(empty, limit=3)}; remove "
                "the empty ones, or name regions."
            )
        if len(wanted) > MOST_REGIONS:
            raise InputError(
                f"expected at most {MOST_REGIONS} regions in one report, got {len(wanted):,}; make several reports, "
                "each of some of them."
            )
        _ = self.genes  # what is wrong with them is said before the work
        for region in wanted:
            longest = min(LONGEST, self.changes.context or self.changes.longest)
            if len(region) > longest:
                raise InputError(
                    f"region {region}: expected at most {longest:,} bases, so that they are read at once, got "
                    f"{len(region):,} (regions that touch are one); give shorter regions"
                    f"{', or a larger --context' if longest < LONGEST else ''}."
                )
            first, last = self.window(region)
            if last - first < 2:
                raise InputError(f"region {region}: a base that nothing stands beside cannot be explained.")
            letters = self.genome.fetch(region.record, first, last)
            check_letters(letters, f"{self.genome.name}, record {region.record}", first)
            yield JobChunk(len(region), (region.record, region.start, region.end))

    @functools.cached_property
    def genes(self) -> list[list[Gene]]:
        """The genes of each region, for the pictures.

        Raises:
            InputError: if the file of genes is damaged.
        """
        return [read_genes_of(self.gtf, region) for region in self.wanted()]

    def window(self, region: Interval) -> tuple[int, int]:
        """Where the window starts and ends that a region is read in."""
        context = self.changes.context or len(region)
        return shared_window(Block(region.start, region.end), self.genome.contigs[region.record], context)

    def worker(self, device: str | None) -> Worker:
        """Load the model, and open the genome."""
        return _Worker(self, device)

    def beside(self, output: Path) -> list[Path]:
        """Nothing: all is in the folder."""
        return []

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Write the tables, the pictures and the report that shows them."""
        from .explain_report import write_html_report

        output.mkdir()
        parts: dict[str, list[pa.Table]] = {name: [] for name in (*SCHEMAS, "changes")}
        for result in results:
            for name, content in zip(result["name"].to_pylist(), result["table"].to_pylist(), strict=True):
                parts[name].append(pa.ipc.open_stream(content).read_all())
        tables = {name: pa.concat_tables(found) for name, found in parts.items() if found}
        tables["kmers"] = _joined_kmers(tables["kmers"])
        write_html_report(self, tables, output)
        for name, table in tables.items():
            pa.parquet.write_table(table, output / f"{name}.parquet", compression="zstd")
        write_whole(output / "record.json", json.dumps(record, indent=2) + "\n")


class _Worker:
    """A model and a genome, as a function of regions."""

    def __init__(self, job: ExplainJob, device: str | None):
        self._job = job
        self._loaded = loaded = job.model.load(job.changes.head, device)
        if not memories_of(loaded.model):
            raise no_memory(job.model)
        self._wanted = kmers_to_knock_out(loaded.model, job.knock_out, job.reverse_complements)
        loaded.model.config.use_cache = False
        self._tokens = BaseTokens.of(loaded.tokenizer)
        values = OF_MEMORY if job.is_classifier else VALUES
        context = max(LONGEST, job.changes.context or 0)  # never less than the window of a region
        self._tracks = TrackModel(
            loaded.model, self._tokens, job.changes.head == "masked", values, job.model.strands, context,
            checked_overlap(context, None), job.model.batch_tokens,
        )  # fmt: skip
        self._names = {memory.layer_idx: str(name) for name, memory in memories_by_layer(loaded.model).items()}
        self._mutations: MutateWorker | None = None
        self._dependencies: DependencyWorker | None = None
        self.advance: Callable[[int], Any] = lambda bases: None

    def __call__(self, content: tuple[str, int, int]) -> pa.Table:
        region = Interval(*content)
        contributions, kmers, shares = self._explained(region)
        tables = {
            "bases": pa.concat_tables([self._bases(region), shares]),
            "contributions": contributions,
            "kmers": kmers,
        }
        if self._wanted:
            tables["knock_out"] = self._knocked_out(region)
        if self._job.mutates:
            tables |= self._changed(region, self._loaded)
        self.advance(len(region))
        return pa.table(
            {"name": pa.array(list(tables)), "table": pa.array([_bytes_of(each) for each in tables.values()])}
        )

    def _values(self, region: Interval) -> dict[tuple[str, str, str], np.ndarray]:
        """Values (length,) of bases by their name, layer and strand, in the window that contributions are of."""
        first, last = self._job.window(region)
        letters = self._job.genome.fetch(region.record, first, last)
        found = self._tracks.of_part(
            lambda start, end: letters[start:end], len(letters), region.start - first, region.end - first
        )
        return {
            (track.value, "" if track.layer is None else self._names[track.layer], track.strand): found[track.name]
            for track in self._tracks.tracks
        }

    def _bases(self, region: Interval) -> pa.Table:
        values = self._values(region)
        return pa.concat_tables([self._long(region, *names, numbers) for names, numbers in values.items()])

    def _long(self, region: Interval, value: str, layer: str, strand: str, numbers: np.ndarray) -> pa.Table:
        letters = self._job.genome.fetch(region.record, region.start, region.end)
        count = len(region)
        columns: list[Any] = [
            pa.repeat(region.record, count),
            np.arange(region.start, region.end) + 1,
            pa.array(list(letters)),
            pa.repeat(strand, count),
            pa.repeat(layer, count),
            pa.repeat(value, count),
            pa.array(numbers.astype(np.float64), from_pandas=True),
        ]
        return pa.table(columns, schema=SCHEMAS["bases"])

    def _explained(self, region: Interval) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Contributions of k-mers, their sums by k-mer, and those of bases."""
        first, last = self._job.window(region)
        letters = self._job.genome.fetch(region.record, first, last)
        is_base = np.isin(list(letters.upper()), list("ACGTU"))
        rows, shares = [], []
        totals: dict[tuple[str, str], KmerTotals] = {}
        for layer in memories_by_layer(self._loaded.model):
            for strand in STRANDS[self._job.model.strands]:
                ids = self._ids(letters if strand == "+" else reverse_complement(letters))
                place = _Place(region, first, last, strand, len(self._tokens.before), is_base)
                for found in explain_targets(self._loaded.model, ids, self._job.targets, layer):
                    inside, target = place.inside(found), found.target
                    _check_inside(region, found, inside)
                    totals.setdefault((str(layer), target), KmerTotals()).add(found, inside)
                    rows.append(place.rows(found, inside, str(layer), target))
                    shares.append(
                        self._long(region, f"contribution:{target}", str(layer), strand, place.by_base(found, inside))
                    )
        kmers = [_kmer_rows(summed, *names) for names, summed in totals.items()]
        return pa.concat_tables(rows), pa.concat_tables(kmers), pa.concat_tables(shares)

    def _ids(self, text: str) -> torch.Tensor:
        ids = [*self._tokens.before, *self._tokens.encode(text).tolist(), *self._tokens.after]
        return torch.tensor([ids], device=self._loaded.device)

    def _knocked_out(self, region: Interval) -> pa.Table:
        """What changes without the rows of the k-mers."""
        before = self._measured(region)
        with knocked_out(self._loaded.model, self._wanted):
            after = self._measured(region)
        rows = [
            {
                "chrom": region.record,
                "start": region.start + 1,
                "end": region.end,
                "strand": strand,
                "value": value,
                "before": number,
                "after": after[value, strand],
            }
            for (value, strand), number in before.items()
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMAS["knock_out"])

    def _measured(self, region: Interval) -> dict[tuple[str, str], float]:
        """Means over a region by value and strand; of a class, its score."""
        found: dict[tuple[str, str], float] = {}
        for (value, layer, strand), numbers in self._values(region).items():
            name = f"mean {value} of layer {layer}" if layer else f"mean {value}"
            found[name, strand] = float(np.nanmean(numbers)) if (~np.isnan(numbers)).any() else float("nan")
        if self._job.is_classifier:
            first, last = self._job.window(region)
            letters = self._job.genome.fetch(region.record, first, last)
            effects = ClassEffects(self._loaded.model, self._loaded.tokenizer, self._job.changes.label or 0)
            for strand in STRANDS[self._job.model.strands]:
                text = letters if strand == "+" else reverse_complement(letters)
                found["log-odds of the class", strand] = effects.scores([text])[0]
        return found

    def _changed(self, region: Interval, loaded: LoadedModel) -> dict[str, pa.Table]:
        """Effects of all changes of a region, and dependencies if it is short."""
        job, block = self._job.changes, Block(region.start, region.end)
        if self._mutations is None:
            self._mutations = MutateWorker(job, None, loaded)
        pieces = [
            self._mutations((region.record, part, part.start, part.end))
            for part in region_blocks(*block, job.per_window)
        ]
        tables = {"changes": pa.concat_tables(pieces)}
        if self._job.is_classifier or len(region) > LONGEST_MATRIX:
            return tables
        if self._dependencies is None:
            assert job.context is not None
            arguments = (job.fasta, job.model, job.regions, job.beds, job.output, job.head == "masked", job.context)
            self._dependencies = DependencyWorker(DependencyJob(*arguments), None, loaded)
        tables["dependencies"] = self._dependencies((region.record, block, region.start, region.end))
        return tables


@dataclass(frozen=True)
class _Place:
    """Where a window that was read on a strand lies in the genome."""

    region: Interval
    first: int
    last: int
    strand: str
    before: int  # tokens in front of the first letter
    is_base: np.ndarray  # of the window: whether a letter is a base, and not N; others have no values, as in tracks

    def on_genome(self, places: np.ndarray) -> np.ndarray:
        """Bases of tokens, on the forward strand from 0."""
        places = places - self.before
        return self.first + places if self.strand == "+" else self.last - 1 - places

    def inside(self, found: Explanation) -> np.ndarray:
        """Which positions lie in the region and are bases, (1, length)."""
        places = self.on_genome(np.arange(found.last.shape[1]))
        inside = (places >= self.region.start) & (places < self.region.end)
        inside[inside] = self.is_base[places[inside] - self.first]
        return inside[None]

    def rows(self, found: Explanation, inside: np.ndarray, layer: str, target: str) -> pa.Table:
        """Contributions at the positions of the region."""
        table = found.table
        position = table["position"].to_numpy()
        table, position = table.filter(pa.array(inside[0][position])), position[inside[0][position]]
        lengths = np.array([len(kmer) for kmer in table["kmer"].to_pylist()], dtype=np.int64)
        start = self.on_genome(table["start"].to_numpy())
        end = start + lengths if self.strand == "+" else start + 1
        start = start if self.strand == "+" else end - lengths
        count = len(position)
        columns: list[Any] = [
            *(pa.repeat(text, count) for text in (self.region.record, self.strand, layer, target)),
            self.on_genome(position) + 1,
            start + 1,
            end,
            table["kmer"].combine_chunks(),
            table["contribution"].combine_chunks(),
        ]
        return pa.table(columns, schema=SCHEMAS["contributions"])

    def by_base(self, found: Explanation, inside: np.ndarray) -> np.ndarray:
        """What the letters of the region contribute to its positions, on the forward strand: (length,)."""
        letters = found.by_base(inside)[0]
        places = self.on_genome(np.arange(len(letters)))
        values = np.zeros(len(self.region))
        chosen = (places >= self.region.start) & (places < self.region.end)
        values[places[chosen] - self.region.start] = letters[chosen]
        return values


def _check_inside(region: Interval, found: Explanation, inside: np.ndarray) -> None:
    """Refuse a region in which nothing of a class is computed, though something is beside it.

    Raises:
        InputError: if so: of a class by the lens, only what the head reads counts, such as the last base.
    """
    is_something = (found.total != 0).cpu().numpy()
    if found.target.startswith("class:") and is_something.any() and not is_something[inside].any():
        raise InputError(
            f"region {region}: the classifier's head reads bases outside the region only, as one does that pools the "
            "last base of the window; leave --context out, so that the region alone is read."
        )


def _kmer_rows(summed: KmerTotals, layer: str, target: str) -> pa.Table:
    found = summed.table
    count = found.num_rows
    columns: list[Any] = [
        pa.repeat(layer, count),
        pa.repeat(target, count),
        found["kmer"].combine_chunks(),
        pa.repeat(pa.scalar(1, pa.int64()), count),
        found["occurrences"].combine_chunks(),
        found["contribution"].combine_chunks(),
    ]
    return pa.table(columns, schema=SCHEMAS["kmers"])


def _joined_kmers(table: pa.Table) -> pa.Table:
    """The sums of all regions, the largest contribution, either way, first."""
    summed = [(name, "sum") for name in ("regions", "occurrences", "contribution")]
    found = table.group_by(["layer", "target", "kmer"], use_threads=False).aggregate(summed)
    found = found.rename_columns([name.removesuffix("_sum") for name in found.column_names])
    order = np.argsort(-np.abs(found["contribution"].to_numpy()), kind="stable")
    return found.select(SCHEMAS["kmers"].names).take(pa.array(order)).cast(SCHEMAS["kmers"])


def _bytes_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _is_unique(config: Any, name: str | None) -> bool:
    """Whether one class alone has the name, so that a target may be named after it."""
    return [str(label) for label in config.id2label.values()].count(str(name)) == 1


def explain_job(
    fasta: str | Path,
    output: str | Path,
    regions: Sequence[str | Path] = (),
    *,
    whole_genome: bool = False,
    model: ModelOptions | None = None,
    gtf: str | Path | None = None,
    context: int | None = None,
    of_class: str | int | None = None,
    knock_out: Sequence[str] = (),
    reverse_complements: bool = False,
    mutates: bool = True,
    jaspar: str | None = None,
) -> ExplainJob:
    """The job of `gengram explain`, for `run_job(job, output)`.

    Args:
        fasta: the genome, or sequences.
        output: folder to make.
        regions: texts such as `chr1:1,000-2,000`, and BED files.
        whole_genome: all of the FASTA file, instead of regions.
        model: which model, and how.
        gtf: genes for the pictures.
        context: bases of the window around each region; by default 512 or, if that is less, what the model reads. A
            classifier of sequences reads the region alone by default.
        of_class: name or number of the class, of a classifier of sequences.
        knock_out: k-mers whose rows are zeroed for a comparison.
        reverse_complements: whether those of the k-mers are, too.
        mutates: whether every base is changed.
        jaspar: the tax group of the motifs that k-mers are compared with, or `all`; None for no comparison.

    Raises:
        ValueError: if a value or option does not fit the model.
        OSError: if there is no such model.
        MissingExtraError: if a library for pictures or motifs is not installed.
    """
    from ...support.figures import pyplot

    pyplot()
    if jaspar is not None and not known_motifs(None if jaspar == "all" else jaspar):
        raise InputError(f"--jaspar: JASPAR CORE has no motifs of {jaspar!r}; try vertebrates, fungi, plants or all.")
    if reverse_complements and not knock_out:
        raise InputError("--knock-out-reverse-complement: name the k-mers with --knock-out.")
    model = model or ModelOptions()
    changes = mutate_job(
        fasta, "changes.parquet", regions, whole_genome=whole_genome, model=model, context=context, of_class=of_class
    )
    config = model.load_config()
    if not says_memory(config):
        raise no_memory(model)
    targets = ["gate_logit", "residual_norm"]
    if changes.label is not None:
        targets.append(f"class:{changes.label_name if _is_unique(config, changes.label_name) else changes.label}")
    elif getattr(config, "memory_layers", None):
        targets.append("base:actual")
    paths = (Path(fasta), model, changes.regions, changes.beds, Path(output))
    genes = None if gtf is None else Path(gtf)
    words = tuple(spelled_kmers(knock_out))
    return ExplainJob(*paths, changes, tuple(targets), genes, words, reverse_complements, mutates, jaspar)
