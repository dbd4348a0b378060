"""`gengram embed`: a file of sequences in, a file of their embeddings out."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ...sequences.alphabet import uncertain_letters
from ...support.errors import InputError
from ..embeddings import BATCHES_TOGETHER, STRANDS, SequenceEncoder, excerpt_of, mean_of_strands
from ..finite import check_finite
from ..long_sequences import checked_overlap
from ..memory_use import fast_memory
from ..pooling import POOLINGS
from .embedding_inputs import Passage, SequenceInput
from .embedding_outputs import (
    MOST_ROWS_OF_H5AD,
    check_embedding_output,
    embedding_table,
    write_embeddings,
)
from .job import JobChunk, ModelOptions, Worker
from .run import JobSummary, run_job

EACH_BASE = "none"  # the pooling that gives a vector for each base
_MOST_SEQUENCES = 1 << 16  # of a chunk
_MOST_NUMBERS = 1 << 24  # of a chunk of vectors of single bases: 64 MiB

# Of one strand of a part of a sequence that does not fit into a chunk, to be joined with the others.
_PART = pa.schema(
    [
        ("name", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("strand", pa.string()),
        ("read", pa.int64()),  # number of the strand among those that are read
        ("bases", pa.int64()),  # that were pooled
        ("is_last", pa.bool_()),
        ("vector", pa.list_(pa.float64())),
    ]
)


@dataclass
class Notes:
    """What a user should know of the input: counts of sequences and bases."""

    sequences: int = 0
    bases: int = 0
    uncertain_bases: int = 0  # N and other codes of several bases, all read as N
    only_uncertain: int = 0  # sequences without A, C, G or T
    in_windows: int = 0  # sequences that are longer than the context


@dataclass
class EmbedJob:
    """Embeddings of all sequences of a file; `embed_job` makes it from what a user says.

    Args:
        source: the sequences.
        model: which model and how; of two strands a sequence gets the mean.
        layer: 0 is the embedding, -1 the last.
        pooling: one of `POOLINGS`, or `none` for a vector of each base.
        context, overlap: bases of a window, and those that it shares with the next one.
        width: numbers of a vector, by the configuration; it only decides how much is computed together.
        most_rows: that the output can hold.
    """

    source: SequenceInput
    model: ModelOptions
    layer: int
    pooling: str
    context: int
    overlap: int
    width: int
    most_rows: int | None = None
    name: str = "embed"
    unit: str = "bp"
    notes: Notes = field(default_factory=Notes)

    @property
    def inputs(self) -> dict[str, Path]:
        """The files that decide the result."""
        files = {"sequences": self.source.path, "fasta": self.source.fasta}
        return {role: path for role, path in files.items() if path is not None}

    def settings(self) -> dict[str, Any]:
        """The options that decide the result, and the rule of long sequences."""
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "context": self.context,
            "overlap": self.overlap,
            "chunks_by_batch_tokens": self.model.batch_tokens,
            "windows": "each base from the window in which the model sees most around it",
            **({"sequence_column": self.source.column} if self.source.kind == "table" else {}),
        }

    def chunks(self) -> Iterator[JobChunk]:
        """Sequences until they fill a chunk; one that does not fit is cut into chunks of its own."""
        size = self._bases_of_a_chunk()
        waiting: list[Passage] = []
        notes, bases = Notes(), 0
        for passage in self.source.passages(size, self.context):
            self._note(notes, passage)
            if not passage.is_whole:
                if waiting:
                    yield JobChunk(bases, waiting)
                    waiting, bases = [], 0
                is_joined = passage.start > 0 and self.pooling != EACH_BASE
                yield JobChunk(passage.end - passage.start, [passage], is_joined)
                continue
            waiting.append(passage)
            bases += passage.length
            if bases >= size or len(waiting) >= _MOST_SEQUENCES:
                yield JobChunk(bases, waiting)
                waiting, bases = [], 0
        if waiting:
            yield JobChunk(bases, waiting)
        self.notes = notes

    def worker(self, device: str | None) -> Worker:
        """The model, as a function of passages."""
        encoder = SequenceEncoder(
            self.model.model,
            self.model.revision,
            self.model.trust_remote_code,
            getattr(torch, self.model.dtype),
            device or self.model.device,
            self.model.batch_tokens,
            self.context,
            self.overlap,
        )
        return _Embedder(self, encoder)

    def beside(self, output: Path) -> list[Path]:
        """Nothing: each format holds the record."""
        return []

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Parts put together, and written in the format of the output's name."""
        write_embeddings(_Rows(results, self.pooling), output, record, self.width)

    def _bases_of_a_chunk(self) -> int:
        """A multiple of the windows' stride, so that two parts of a sequence have few windows in common."""
        bases = BATCHES_TOGETHER * self.model.batch_tokens
        if self.pooling == EACH_BASE:
            bases = min(bases, _MOST_NUMBERS // self.width)
        stride = self.context - self.overlap
        return max(1, bases // stride) * stride

    def _note(self, notes: Notes, passage: Passage) -> None:
        first = passage.start - passage.offset
        uncertain = uncertain_letters(passage.text[first : first + passage.end - passage.start])
        notes.sequences += passage.start == 0
        notes.bases += passage.end - passage.start
        notes.uncertain_bases += uncertain
        notes.only_uncertain += passage.is_whole and uncertain == passage.length
        notes.in_windows += passage.start == 0 and passage.length > self.context
        rows = notes.bases if self.pooling == EACH_BASE else notes.sequences
        if self.most_rows is not None and rows > self.most_rows:
            raise InputError(f"--output: this format holds at most {self.most_rows:,} rows; write .parquet instead.")


def embed_job(
    sequences: str | Path,
    output: str | Path,
    fasta: str | Path | None = None,
    *,
    model: ModelOptions | None = None,
    layer: int = -1,
    pooling: str = "mean",
    context: int | None = None,
    overlap: int | None = None,
    sequence_column: str = "sequence",
) -> EmbedJob:
    """The job of `embed_file`, whose arguments these are; nothing is computed yet."""
    model, output = model or ModelOptions(), Path(output)
    if pooling not in (*POOLINGS, EACH_BASE):
        raise ValueError(f"pooling: expected {', '.join((*POOLINGS, EACH_BASE))}, got {pooling!r}.")
    check_embedding_output(output)
    source = SequenceInput(Path(sequences), None if fasta is None else Path(fasta), sequence_column)
    config = model.load_config()
    context = model.bases_at_once(context)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= layer <= layers:
        raise ValueError(f"layer: expected 0 (the embedding) to {layers}, or -1 for the last, got {layer}.")
    return EmbedJob(
        source,
        model,
        layer,
        pooling,
        context,
        checked_overlap(context, overlap),
        width=getattr(config, "hidden_size", None) or 1024,
        most_rows=MOST_ROWS_OF_H5AD if output.suffix == ".h5ad" else None,
    )


def embed_file(
    sequences: str | Path, output: str | Path, fasta: str | Path | None = None, **options: Any
) -> JobSummary:
    """Embed all sequences of a file: one call for all that `gengram embed` does.

    Args:
        sequences: FASTA or FASTQ, plain or compressed; a CSV, TSV or Parquet table; or BED, with `fasta`.
        output: `.parquet`, `.npz` or `.h5ad`, with the columns name, start, end, strand and embedding.
        fasta: the genome that BED is of.
        options: `model` (a `ModelOptions`), `layer`, `pooling`, `context`, `overlap` and `sequence_column`, as the
            command's; and `engine`, `shard`, `restart` and `progress`, as `run_job` has them.

    Raises:
        ValueError: if the input, the model or an option cannot be used.
        OSError: if a file cannot be read or written.
        MissingExtraError: if a library for the genome or the output is not installed.
    """
    names = ("engine", "shard", "restart", "progress")
    running = {name: options.pop(name) for name in names if name in options}
    return run_job(embed_job(sequences, output, fasta, **options), output, **running)


class _Embedder:
    """Computes chunks."""

    def __init__(self, job: EmbedJob, encoder: SequenceEncoder):
        self.advance: Callable[[int], Any] = lambda bases: None
        self._job, self._encoder = job, encoder
        self._layer = encoder.layer(job.layer)
        self._opened = contextlib.ExitStack()  # for as long as this lives
        self._opened.enter_context(fast_memory(encoder.model))

    def __call__(self, passages: Sequence[Passage]) -> pa.Table:
        """Rows of these passages, or of a part of a sequence what there is to be joined."""
        strands = [_read_strands(passage, self._job.model.strands) for passage in passages]
        excerpts = [
            excerpt_of(
                self._encoder.tokens,
                passage.text,
                strand,
                passage.offset,
                passage.start,
                passage.end,
                passage.length,
            )
            for passage, own in zip(passages, strands, strict=True)
            for strand in own
        ]
        labels = [own if len(own) == 1 else "." for own in strands]

        def advance(bases: int) -> None:
            self.advance(bases // len(strands[0]))

        if self._job.pooling == EACH_BASE:
            vectors_of_bases = self._encoder.base_vectors(excerpts, self._layer, advance)
            return self._each_base(passages, strands, labels, vectors_of_bases)
        (vectors,) = self._encoder.pooled(excerpts, [(self._layer, self._job.pooling)], advance).values()
        if not passages[0].is_whole:
            counts = [max(0, end - start) for start, end in (own.pooled(self._job.pooling) for own in excerpts)]
            check_finite(vectors[np.array(counts) > 0], self._encoder.model)
            return _part(passages[0], labels[0], counts, vectors)
        check_finite(vectors, self._encoder.model)
        columns = {
            "name": [passage.name for passage in passages],
            "start": [passage.origin for passage in passages],
            "end": [passage.origin + passage.length for passage in passages],
            "strand": labels,
        }
        means = vectors.reshape(len(passages), -1, vectors.shape[1]).mean(axis=1)
        return embedding_table(columns, means.astype(np.float32))

    def _each_base(
        self, passages: Sequence[Passage], strands: Sequence[str], labels: Sequence[str], vectors: list[np.ndarray]
    ) -> pa.Table:
        found = iter(vectors)
        means = np.concatenate([mean_of_strands([next(found) for _ in own], own) for own in strands])
        check_finite(means, self._encoder.model)
        counts = [passage.end - passage.start for passage in passages]
        starts = np.concatenate(
            [np.arange(passage.start, passage.end) + passage.origin for passage in passages], dtype=np.int64
        )
        columns = {
            "name": np.repeat(np.array([passage.name for passage in passages], dtype=object), counts),
            "start": starts,
            "end": starts + 1,
            "strand": np.repeat(np.array(labels, dtype=object), counts),
        }
        return embedding_table(columns, means)


class _Rows:
    """The rows of all results, parts of sequences joined; every loop over them reads the results again."""

    def __init__(self, results: Iterable[pa.Table], pooling: str):
        self._results, self._pooling = results, pooling

    def __iter__(self) -> Iterator[pa.Table]:
        joined: dict[int, tuple[int, np.ndarray]] = {}  # bases and vector of each strand so far
        for table in self._results:
            if table.schema != _PART:
                yield table
                continue
            rows = table.to_pylist()
            for row in rows:
                if row["bases"]:
                    joined[row["read"]] = self._join(joined.get(row["read"]), row["bases"], np.array(row["vector"]))
            if rows[0]["is_last"]:
                mean = np.mean([vector for _, vector in joined.values()], axis=0, keepdims=True)
                columns = {name: [rows[0][name]] for name in ("name", "start", "end", "strand")}
                yield embedding_table(columns, mean.astype(np.float32))
                joined = {}

    def _join(self, before: tuple[int, np.ndarray] | None, bases: int, vector: np.ndarray) -> tuple[int, np.ndarray]:
        if before is None:
            return bases, vector
        if self._pooling == "max":
            return before[0] + bases, np.maximum(before[1], vector)
        share = bases / (before[0] + bases)
        return before[0] + bases, before[1] * (1 - share) + vector * share


def _part(passage: Passage, label: str, counts: Sequence[int], vectors: np.ndarray) -> pa.Table:
    """A row for each strand that is read."""
    return pa.Table.from_pylist(
        [
            {
                "name": passage.name,
                "start": passage.origin,
                "end": passage.origin + passage.length,
                "strand": label,
                "read": read,
                "bases": bases,
                "is_last": passage.end == passage.length,
                "vector": vectors[read].tolist(),
            }
            for read, bases in enumerate(counts)
        ],
        schema=_PART,
    )


def _read_strands(passage: Passage, choice: str) -> str:
    """The strands that are read; `forward` is that of the region, if it is on one."""
    if choice == "both":
        return STRANDS[choice]
    return "-" if (passage.strand == "-") == (choice == "forward") else "+"
