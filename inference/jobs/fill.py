"""`gengram fill`: sequences with gaps in, the same with the most likely bases out, and the probabilities of all."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

from ...sequences.alphabet import BASES
from ...sequences.fasta_output import FASTA_SUFFIXES, fasta_output, is_fasta_name
from ...sequences.gaps import GappedSequence, find_gaps
from ...sequences.sequence_files import stream_sequences
from ...support.errors import InputError, quoted
from ..filling import (
    DEFAULT_CONTEXT,
    DEFAULT_JOINT,
    GapFiller,
    GapWindow,
    check_fill_options,
    gap_windows,
    with_bases,
)
from ..loaded_model import head_of
from .job import JobChunk, ModelOptions, Worker
from .run import JobSummary, run_job
from .tables import TABLE_SUFFIXES, beside_table, check_table_output, write_table

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("start", pa.int64()),
        ("base", pa.string()),
        *((f"p_{base}", pa.float64()) for base in BASES),
        ("status", pa.string()),
    ]
)
# And the number of the sequence; a sequence without gaps has a row without a start.
_RESULTS = SCHEMA.append(pa.field("record", pa.int64()))

_WINDOWS_PER_CHUNK = 64


class _Wanted(NamedTuple):
    """A window of a sequence, or none if the sequence has no gaps."""

    record: int  # number of the sequence
    name: str
    start: int = 0  # of the window
    window: GapWindow | None = None


@dataclass
class FillJob:
    """The gaps of all sequences of a file; `fill_job` makes it from what a user says.

    Args:
        sequences: FASTA or FASTQ.
        model: which model and how.
        is_masked: whether it is a masked model.
        context: most bases of the window around a gap.
        joint: most gaps that a causal model fills together.
        nearest: whether a gap with more of them in its window is filled together with the nearest ones, the others
            being N, instead of being left.
        longest_run: runs of more unknown bases stay as they are.
        with_codes: whether IUPAC codes of two or three bases are gaps, too.
        least_probability: a base that is less probable is not written into its sequence.
        table_suffix: format of the table beside FASTA.
    """

    sequences: Path
    model: ModelOptions
    is_masked: bool
    context: int
    joint: int
    nearest: bool
    longest_run: int
    with_codes: bool
    least_probability: float
    table_suffix: str
    name: str = field(default="fill", init=False)
    unit: str = field(default="gap", init=False)
    counts: Counter[str] = field(default_factory=Counter, init=False)  # gaps that were written, by status
    long_runs: int = field(default=0, init=False)  # of the whole file
    long_run_bases: int = field(default=0, init=False)

    @property
    def inputs(self) -> dict[str, Path]:
        """The file that decides the result."""
        return {"sequences": self.sequences}

    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {
            "context": self.context,
            "joint": None if self.is_masked else self.joint,
            "nearest": self.nearest,
            "longest_run": self.longest_run,
            "with_codes": self.with_codes,
            "least_probability": self.least_probability,
        }

    def chunks(self) -> Iterator[JobChunk]:
        """Windows of several sequences, or of a part of one.

        Raises:
            InputError: if the file cannot be read, or a sequence is not DNA.
        """
        long_runs = long_run_bases = 0
        waiting: list[_Wanted] = []
        for record, (name, _, found) in enumerate(self._records()):
            long_runs += found.long_runs
            long_run_bases += found.long_run_bases
            wanted = self._windows(record, name, found)
            first = list(itertools.islice(wanted, _WINDOWS_PER_CHUNK))
            if len(waiting) + len(first) > _WINDOWS_PER_CHUNK:
                yield _chunk(waiting)
                waiting = []
            if len(first) < _WINDOWS_PER_CHUNK:
                waiting += first
                continue
            yield _chunk(first)
            while more := list(itertools.islice(wanted, _WINDOWS_PER_CHUNK)):
                yield _chunk(more, continues=True)
        if waiting:
            yield _chunk(waiting)
        # Here, since later readings stop where a run has nothing more to compute.
        self.long_runs, self.long_run_bases = long_runs, long_run_bases

    def _records(self) -> Iterator[tuple[str, str, GappedSequence]]:
        """Name, description and letters of each sequence; the longest one has to fit into memory."""
        pieces: list[str] = []
        for piece in stream_sequences(self.sequences):
            pieces.append(piece.text)
            if piece.is_last:
                try:
                    found = find_gaps("".join(pieces), self.longest_run, self.with_codes)
                except InputError as error:
                    raise InputError(f"{self.sequences}, sequence {quoted([piece.name])}: {error}") from None
                yield piece.name, piece.description, found
                pieces = []

    def _windows(self, record: int, name: str, found: GappedSequence) -> Iterator[_Wanted]:
        if not found.gaps:
            yield _Wanted(record, name)
        for start, window in gap_windows(
            found.letters, found.gaps, self.context, None if self.is_masked else self.joint
        ):
            yield _Wanted(record, name, start, window)

    def worker(self, device: str | None) -> Worker:
        """The model, as a function of windows."""
        loaded = self.model.load("masked" if self.is_masked else "causal", device)
        filler = GapFiller(loaded.model, loaded.tokenizer, self.model.strands, self.is_masked, self.model.batch_tokens)

        def fill(chunk: list[_Wanted]) -> pa.Table:
            windows = [(wanted.start, wanted.window) for wanted in chunk if wanted.window is not None]
            found = filler.fill(windows, self.nearest, self.least_probability)
            rows: list[dict[str, Any]] = []
            for wanted in chunk:
                gaps = [] if wanted.window is None else next(found)
                rows += [{"record": wanted.record, "name": wanted.name, **gap.row()} for gap in gaps]
                rows += [{"record": wanted.record}] if wanted.window is None else []
            return pa.Table.from_pylist(rows, schema=_RESULTS)

        return fill

    def beside(self, output: Path) -> list[Path]:
        """The table if the output is FASTA, and the record of a TSV."""
        table = self.table_of(output)
        return [*([] if table == output else [table]), *beside_table(table)]

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """The table, and the sequences if the output is FASTA; counts what was written."""
        self.counts.clear()
        table = self.table_of(output)
        write_table(self._counted(results), table, record, SCHEMA)
        if table != output:
            with fasta_output(output) as fasta:
                for name, description, text in self._filled(results):
                    fasta.begin(name, description)
                    fasta.add(text)

    def table_of(self, output: Path) -> Path:
        """Where the table goes."""
        return output.with_name(output.name + self.table_suffix) if is_fasta_name(output) else output

    def _counted(self, results: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in results:
            gaps = table.filter(pa.compute.is_valid(table["start"])).drop_columns("record")
            self.counts.update(gaps["status"].to_pylist())
            yield gaps

    def _filled(self, results: Iterable[pa.Table]) -> Iterator[tuple[str, str, str]]:
        """Name, description and letters of the sequences that have results."""
        rows = (row for table in results for row in table.to_pylist())
        by_record = itertools.groupby(rows, key=lambda row: row["record"])
        wanted, own = next(by_record, (None, None))
        for number, (name, description, found) in enumerate(self._records()):
            if number != wanted or own is None:
                continue
            gaps = ((row["start"], row["base"], row["status"]) for row in own)
            yield name, description, with_bases(found.letters, gaps)
            wanted, own = next(by_record, (None, None))


def _chunk(wanted: list[_Wanted], continues: bool = False) -> JobChunk:
    return JobChunk(sum(len(each.window.asked) for each in wanted if each.window is not None), wanted, continues)


def fill_job(
    sequences: str | Path,
    output: str | Path,
    *,
    model: ModelOptions | None = None,
    context: int | None = None,
    joint: int = DEFAULT_JOINT,
    nearest: bool = False,
    longest_run: int = 16,
    with_codes: bool = False,
    least_probability: float = 0.0,
    table: str = "tsv",
) -> FillJob:
    """The job of `fill_file`, whose arguments these are; nothing is computed yet."""
    if f".{table}" not in TABLE_SUFFIXES:
        raise ValueError(f"table: expected {' or '.join(suffix[1:] for suffix in TABLE_SUFFIXES)}, got {table}.")
    model, output = model or ModelOptions(), Path(output)
    check_table_output(Path(output.name.lower()), (*FASTA_SUFFIXES, *TABLE_SUFFIXES))
    head = head_of(model.load_config())
    most = model.bases_at_once(context)
    check_fill_options(most, joint, longest_run, least_probability)
    return FillJob(
        Path(sequences),
        model,
        head == "masked",
        min(most, DEFAULT_CONTEXT) if context is None else context,
        joint,
        nearest,
        longest_run,
        with_codes,
        least_probability,
        f".{table}",
    )


def fill_file(sequences: str | Path, output: str | Path, **options: Any) -> JobSummary:
    """Fill the gaps of all sequences of a file: one call for all that `gengram fill` does.

    Args:
        sequences: FASTA or FASTQ, plain or compressed.
        output: FASTA (`.fa`, `.fasta`, `.fna`, also with `.gz`), beside which the table `OUTPUT.tsv` appears; or the
            table alone, `.tsv` or `.parquet`. Its columns are name, start (from 0), base, p_A, p_C, p_G, p_T and
            status, one of `filling.STATUSES`.
        options: those of `FillJob` that a user may choose, `table` being `tsv` or `parquet`; and `engine`, `shard`,
            `restart` and `progress`, as `run_job` has them.

    Raises:
        ValueError: if the input, the model or an option cannot be used.
        OSError: if a file cannot be read or written.
    """
    names = ("engine", "shard", "restart", "progress")
    running = {name: options.pop(name) for name in names if name in options}
    return run_job(fill_job(sequences, output, **options), output, **running)
