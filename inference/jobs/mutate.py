"""`gengram mutate`: the effect of every single-base change of a region, on its likelihood or on a class."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...support.default_model import model_name
from ...support.errors import InputError, quoted
from ..base_tokens import BaseTokens
from ..class_effects import ClassEffects
from ..embeddings import context_of
from ..loaded_model import LoadedModel, context_length, head_of
from ..memory_use import fast_memory
from ..mutations import Block, Mutation, mutations_of, region_blocks
from ..variant_effects import SHORTEST_CONTEXT
from ..window_effects import WindowEffects
from .job import JobChunk, ModelOptions
from .region_tables import RegionTableJob, rounded
from .regions import texts_and_beds
from .tables import beside_table, check_table_output, read_written, write_table

DEFAULT_CONTEXT = 512
CLASSES = "classes"  # the head of a classifier of sequences
_BASES_PER_CHUNK = 64

_Strands = tuple[float | None, float | None]  # on the forward and on the reverse strand


def mutation_schema(effect: str) -> pa.Schema:
    """Columns of the table, whose effect is `llr` or `effect`."""
    names = (effect, f"{effect}_forward", f"{effect}_reverse")
    return pa.schema(
        [
            ("chrom", pa.string()),
            ("pos", pa.int64()),
            ("ref", pa.string()),
            ("alt", pa.string()),
            *((name, pa.float64()) for name in names),
            ("status", pa.string()),
        ]
    )


@dataclass
class MutateJob(RegionTableJob):
    """Effects of all single-base changes of regions; make it with `mutate_job`.

    Args:
        head: `causal` or `masked` for the likelihood, or `classes`.
        context: bases of a window; None to read each region alone.
        longest: bases that the model reads at once.
        per_window: most neighbouring bases that share a window.
        deletions: whether single bases are deleted, too.
        label: number of the class.
        label_name: its name.
    """

    head: str
    context: int | None
    longest: int
    per_window: int
    deletions: bool = False
    label: int | None = None
    label_name: str | None = None
    name: str = field(default="mutate", init=False)
    unit: str = field(default="bp", init=False)
    counts: Counter[str] = field(default_factory=Counter, init=False)  # of what was written, by status

    @property
    def effect(self) -> str:
        """The column of the effect."""
        return "effect" if self.head == CLASSES else "llr"

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table."""
        return mutation_schema(self.effect)

    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {
            "regions": list(self.regions),
            "context": self.context or "the region",
            "per_window": self.per_window,
            "deletions": self.deletions,
            "class": None if self.label is None else {"number": self.label, "name": self.label_name},
        }

    def chunks(self) -> Iterator[JobChunk]:
        """Some bases of a block at a time; a block shares a window.

        Raises:
            InputError: if a region does not lie in the genome, or is longer than the model reads.
        """
        for region in self.wanted():
            if self.context is None and not 2 <= len(region) <= self.longest:
                raise InputError(
                    f"region {region}: expected 2 to {self.longest:,} bases, which {model_name(self.model.model)} "
                    f"reads at once, got {len(region):,}; give the length of the window as --context."
                )
            for block in region_blocks(region.start, region.end, self.per_window):
                for start in range(block.start, block.end, _BASES_PER_CHUNK):
                    end = min(start + _BASES_PER_CHUNK, block.end)
                    yield JobChunk(end - start, (region.record, block, start, end))

    def worker(self, device: str | None) -> "MutateWorker":
        """Load the model, and open the genome."""
        return MutateWorker(self, device)

    def beside(self, output: Path) -> list[Path]:
        """The record of a TSV."""
        return beside_table(output)

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Write the table, and count its rows."""
        self.counts.clear()
        write_table(self._counted(results), output, record, self.schema)

    def _counted(self, results: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in results:
            self.counts.update(table["status"].to_pylist())
            yield table

    def counted(self) -> dict[str, int]:
        """How many changes have which status, in the output that is there."""
        if not self.counts:  # an earlier run wrote it
            self.counts.update(read_written(self.output, self.schema)["status"].to_pylist())
        return dict(self.counts.most_common())


class MutateWorker:
    """Computes chunks of a `MutateJob`.

    Args:
        job: the job.
        device: where the model runs.
        loaded: the job's model, if it is there already.
    """

    def __init__(self, job: MutateJob, device: str | None, loaded: LoadedModel | None = None):
        self._job = job
        loaded = loaded or job.model.load(job.head, device)
        strands, tokens = job.model.strands, job.model.batch_tokens
        if job.head == CLASSES:
            self._classes = ClassEffects(loaded.model, loaded.tokenizer, job.label or 0, strands, tokens)
            self._effects = self._on_class
        else:
            self._windows = WindowEffects(
                loaded.model, loaded.tokenizer, ("llr",), strands, job.head == "masked", tokens
            )
            self._effects = self._on_likelihood
        self._fast = contextlib.ExitStack()  # as long as this object
        self._fast.enter_context(fast_memory(loaded.model))
        self.advance: Callable[[int], Any] | None = None  # called with the number of bases that are done

    def __call__(self, content: tuple[str, Block, int, int]) -> pa.Table:
        """The rows of a chunk."""
        job, (contig, block, start, end) = self._job, content
        length = job.genome.contigs[contig]
        context = job.context or block.end - block.start
        mutations = list(
            mutations_of(
                lambda first, last: job.genome.fetch(contig, first, last),
                length,
                block,
                range(start, end),
                context,
                job.deletions,
                1 if job.head == CLASSES else SHORTEST_CONTEXT,
            )
        )
        names = job.schema.names[4:7]
        rows, done = [], start
        for mutation, strands in zip(mutations, self._effects(mutations), strict=True):
            known = [number for number in strands if number is not None]
            numbers = [sum(known) / len(known) if known else None, *strands]
            rows.append(
                {
                    "chrom": contig,
                    "pos": mutation.place + 1,
                    "ref": mutation.reference,
                    "alt": mutation.alternative,
                    **dict(zip(names, map(rounded, numbers), strict=True)),
                    "status": mutation.status,
                }
            )
            if self.advance is not None and mutation.place > done:
                self.advance(mutation.place - done)
                done = mutation.place
        return pa.Table.from_pylist(rows, schema=job.schema)

    def _on_likelihood(self, mutations: Sequence[Mutation]) -> Iterator[_Strands]:
        for found in self._windows.of(mutation.change for mutation in mutations):
            forward, reverse = (None, None) if found is None else found
            yield None if forward is None else forward.llr, None if reverse is None else reverse.llr

    def _on_class(self, mutations: Sequence[Mutation]) -> Iterator[_Strands]:
        for found in self._classes.of(mutation.change for mutation in mutations):
            yield (None, None) if found is None else (found.forward, found.reverse)


def mutate_job(
    fasta: str | Path,
    output: str | Path,
    regions: Sequence[str | Path] = (),
    *,
    whole_genome: bool = False,
    model: ModelOptions | None = None,
    context: int | None = None,
    per_window: int | None = None,
    deletions: bool = False,
    of_class: str | int | None = None,
) -> MutateJob:
    """The job of `gengram mutate`, for `run_job(job, job.output)`.

    Args:
        fasta: the genome.
        output: the table, `.tsv` or `.parquet`.
        regions: texts such as `chr1:1,000-2,000`, and BED files.
        whole_genome: all of the FASTA file, instead of regions.
        model: which model, and how.
        context: bases of a window; by default 512 or, if that is less, what the model reads. A classifier of sequences
            reads the region alone by default.
        per_window: most neighbouring bases that share a window; by default half of the context, or all that a
            classifier reads. With 1, windows are those of `gengram score`.
        deletions: whether single bases are deleted, too.
        of_class: name or number of the class, of a classifier of sequences.

    Raises:
        ValueError: if a value or option does not fit the model.
        OSError: if there is no such model.
    """
    model = model or ModelOptions()
    check_table_output(Path(output))
    texts, beds = texts_and_beds(regions, whole_genome)
    config, name = model.load_config(), model_name(model.model)
    label = label_of(config, name, of_class)
    head = head_for(config, name) if label is None else CLASSES
    if deletions and head == "masked":
        raise InputError(
            f"--deletions: {name} is a masked model, which has no likelihood of a deletion; leave it out."
        )
    context, longest = window_sizes(model, config, context, None if head == CLASSES else DEFAULT_CONTEXT)
    if per_window is not None and context is None:
        raise InputError("--per-window: a classifier reads each region alone; give the window's length as --context.")
    if per_window is None:
        per_window = (context or longest) // (1 if head == CLASSES else 2)
    if not 1 <= per_window <= (context or longest):
        raise InputError(f"--per-window: expected 1 to {context or longest:,} bases, got {per_window:,}.")
    label_name = None if label is None else str(config.id2label.get(label, label))
    arguments = (Path(fasta), model, texts, beds, Path(output), head, context, longest, per_window, deletions)
    return MutateJob(*arguments, label, label_name)


def window_sizes(model: ModelOptions, config: Any, context: int | None, default: int | None) -> tuple[int | None, int]:
    """Bases of a window, `default` at most if nothing is asked for, and the most that the model reads.

    Raises:
        ValueError: if the window has no two bases, or more than the model reads.
    """
    tokenizer = model.load_tokenizer()
    tokens = BaseTokens.of(tokenizer)
    most_tokens = context_length(config, tokenizer)
    longest = context_of(most_tokens, tokens)
    if context is None:
        return (None if default is None else min(default, longest)), longest
    if context < 2:
        raise InputError(f"--context: expected 2 to {longest:,} bases, got {context}.")
    return context_of(most_tokens, tokens, context), longest


def head_for(config: Any, name: str) -> str:
    """The language model's head, `causal` or `masked`.

    Raises:
        InputError: if the model is no language model.
    """
    head = head_of(config)
    if head is None:
        is_classifier = _is_classifier(config)
        hint = f"; name one of its classes with --class: {_classes(config)}" if is_classifier else ""
        raise InputError(f"{name} is no causal or masked language model by its configuration{hint}.")
    return head


def label_of(config: Any, name: str, of_class: str | int | None) -> int | None:
    """The number of the class that is asked for by name or number; None if none is.

    Raises:
        InputError: if the model has no such class.
    """
    if of_class is None:
        return 0 if _is_classifier(config) and config.num_labels == 1 else None
    if not _is_classifier(config):
        raise InputError(f"--class: {name} is no classifier of sequences by its configuration; leave it out.")
    for number, label in config.id2label.items():
        if label == of_class:
            return int(number)
    if str(of_class).isdecimal() and int(of_class) < config.num_labels:
        return int(of_class)
    raise InputError(f"--class: expected one of {_classes(config)}, or its number from 0, got {of_class!r}.")


def _is_classifier(config: Any) -> bool:
    return any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])


def _classes(config: Any) -> str:
    return quoted(config.id2label.values())
