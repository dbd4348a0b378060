"""`gengram explain --model-only`: what a memory learned, without regions and without genes."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ...motif_memory.grafts.attach import IN_CONFIG
from ...support.default_model import model_name
from ...support.errors import InputError
from ...support.whole_output import write_whole
from ..explanation import explain_memory, memories_by_layer
from ..kmer_totals import SCHEMA as TOTALS_SCHEMA
from ..kmer_totals import KmerTotals
from ..loaded_model import LoadedModel, head_of
from ..model_folder import model_files
from ..readiness import SHORTEST, Readiness, random_pieces, readiness
from ..table_structure import check_clustering, codon_structure, kmers_of, sizes_of, symmetry, value_norms
from .job import JobChunk, ModelOptions, Worker

PERMUTATIONS = 1000
PIECES = 40
LONGEST_PIECE = 512  # bases

ROWS, TEXTS = "rows", "texts"
KMER, *TOTALS = TOTALS_SCHEMA
SCHEMA = pa.schema([("layer", pa.string()), KMER, ("value_norm", pa.float64()), *TOTALS])


@dataclass
class ExplainModelJob:
    """What the memories of a model learned; make it with `explain_model_job`.

    Args:
        model: which, and how.
        fasta: sequences that it was not trained on; None for the tables alone.
        twin: the same model trained without its memory.
        permutations: of each test.
        pieces: how many pieces of the sequences are read.
        length: bases of a piece.
    """

    model: ModelOptions
    fasta: Path | None
    twin: ModelOptions | None
    permutations: int
    pieces: int
    length: int
    name: str = field(default="explain", init=False)
    unit: str = field(default="part", init=False)

    @property
    def inputs(self) -> dict[str, Path]:
        """The files that decide the result."""
        found = {} if self.fasta is None else {"fasta": self.fasta}
        if self.twin is not None and (folder := Path(self.twin.model)).is_dir():
            found |= {f"twin/{name}": path for name, path in model_files(folder).items()}
        return found

    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {
            "model_only": True,
            "twin": None if self.twin is None else {**self.twin.settings(), "commit": self.twin.load_commit()},
            "permutations": self.permutations,
            "pieces": self.pieces,
            "length": self.length,
        }

    def chunks(self) -> Iterator[JobChunk]:
        """The texts if there are some, whose faults are seen first, and the tables."""
        if self.fasta is not None:
            yield JobChunk(1, TEXTS)
        yield JobChunk(1, ROWS)

    def worker(self, device: str | None) -> Worker:
        """Load the model."""
        return _Worker(self, device)

    def beside(self, output: Path) -> list[Path]:
        """Nothing: all is in the folder."""
        return []

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Write the numbers, the table of k-mers, the picture and the report that shows them."""
        from .explain_model_report import write_model_report

        output.mkdir()
        found: dict[str, Any] = {}
        tables: list[pa.Table] = []
        for result in results:
            found |= json.loads(result["numbers"][0].as_py())
            tables.append(pa.ipc.open_stream(result["table"][0].as_py()).read_all())
        kmers = tables[0] if len(tables) == 1 else _joined(*reversed(tables))
        write_model_report(self, found, kmers, output)
        write_whole(output / "model.json", json.dumps(found, indent=1) + "\n")
        pa.parquet.write_table(kmers, output / "kmers.parquet", compression="zstd")
        write_whole(output / "record.json", json.dumps(record, indent=2) + "\n")


class _Worker:
    """A model, as a function of the parts."""

    def __init__(self, job: ExplainModelJob, device: str | None):
        self._job, self._device = job, device
        self._loaded = job.model.load(head_of(job.model.load_config()), device)
        self._memories = memories_by_layer(self._loaded.model)
        if not self._memories:
            raise no_memory(job.model)

    def __call__(self, part: str) -> pa.Table:
        numbers, table = self._of_rows() if part == ROWS else self._of_texts()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        columns = [pa.array([json.dumps(numbers)]), pa.array([sink.getvalue().to_pybytes()])]
        return pa.table(columns, names=["numbers", "table"])

    def _of_rows(self) -> tuple[dict[str, Any], pa.Table]:
        numbers: dict[str, Any] = {"symmetry": {}, "codons": {}}
        parts = []
        for layer, memory in self._memories.items():
            sizes = [size for size in sizes_of(memory) if size >= 3]
            numbers["symmetry"][str(layer)] = {
                str(size): symmetry(memory, size, self._job.permutations) for size in sizes
            }
            if 3 in sizes:
                numbers["codons"][str(layer)] = codon_structure(memory, self._job.permutations)
            for size in sizes_of(memory):
                kmers = kmers_of(size)
                columns = [pa.repeat(str(layer), len(kmers)), pa.array(kmers), pa.array(value_norms(memory, size))]
                columns += [pa.nulls(len(kmers), kind.type) for kind in TOTALS]
                parts.append(pa.table(columns, schema=SCHEMA))
        return numbers, pa.concat_tables(parts) if parts else SCHEMA.empty_table()

    def _of_texts(self) -> tuple[dict[str, Any], pa.Table]:
        job = self._job
        assert job.fasta is not None
        texts = random_pieces(job.fasta, job.pieces, job.length)
        found = {"model": readiness(self._loaded, texts)}
        if job.twin is not None:
            found["twin"] = readiness(job.twin.load(head_of(job.twin.load_config()), self._device), texts)
        parts = []
        for layer in self._memories:
            table = _contributions(self._loaded, layer, texts)
            parts.append(table.add_column(0, "layer", pa.repeat(str(layer), table.num_rows)))
        return {"pieces": len(texts), "readiness": summaries(found)}, pa.concat_tables(parts)


def summaries(found: dict[str, Readiness]) -> dict[str, Any]:
    """Means with intervals of a model and, if it is there, its twin, and of the difference over the same texts."""
    result = {name: each.summary() for name, each in found.items()}
    if "twin" in found:
        result["model less twin"] = found["model"].less(found["twin"])
    return result


def _contributions(loaded: LoadedModel, layer: Any, texts: list[str]) -> pa.Table:
    """Which k-mers make what a memory adds to texts: their shares in the residual's norm."""
    totals = KmerTotals()
    for text in texts:
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        totals.add(explain_memory(loaded.model, ids, layer=layer, target="residual_norm"))
    return totals.table


def _joined(rows: pa.Table, contributions: pa.Table) -> pa.Table:
    """The rows with the contributions of those that were met."""
    places = {names: index for index, names in enumerate(zip(*_names(contributions), strict=True))}
    chosen = pa.array([places.get(names) for names in zip(*_names(rows), strict=True)], pa.int64())
    found = rows.select(["layer", "kmer", "value_norm"])
    for kind in TOTALS:
        found = found.append_column(kind.name, contributions[kind.name].combine_chunks().take(chosen))
    order = np.argsort(-np.nan_to_num(np.abs(found["contribution"].to_numpy())), kind="stable")
    return found.take(pa.array(order)).cast(SCHEMA)


def _names(table: pa.Table) -> tuple[list[str], list[str]]:
    return table["layer"].to_pylist(), table["kmer"].to_pylist()


def says_memory(config: Any) -> bool:
    """Whether a model of this configuration has memories, its own or attached ones."""
    return bool(getattr(config, "memory_layers", None) or getattr(config, IN_CONFIG, None))


def no_memory(model: ModelOptions) -> InputError:
    """What is said of a model without one."""
    return InputError(f"{model_name(model.model)} has no motif memory, so there is nothing to explain.")


def _check_twin(config: Any, twin: ModelOptions) -> None:
    """Refuse a twin that has a memory, too, or other layers.

    Raises:
        InputError: if it does.
    """
    other = twin.load_config()
    if says_memory(other):
        raise InputError(
            f"--twin: expected the same model trained without its memory; {twin.model} has a motif memory."
        )
    layers = [getattr(each, "num_hidden_layers", None) for each in (config, other)]
    if layers[0] != layers[1]:
        raise InputError(f"--twin: expected a model of {layers[0]} layers, as many as the other has, got {layers[1]}.")


def explain_model_job(
    fasta: str | Path | None = None,
    *,
    model: ModelOptions | None = None,
    twin: ModelOptions | None = None,
    permutations: int = PERMUTATIONS,
    pieces: int = PIECES,
    length: int | None = None,
) -> ExplainModelJob:
    """The job of `gengram explain --model-only`, for `run_job(job, output)`.

    Args:
        fasta: sequences that the model was not trained on: without them there is no readiness, and it is not said
            which k-mers matter.
        model: which model, and how.
        twin: the same model trained without its memory, whose readiness is compared.
        permutations: of each test.
        pieces: how many pieces of the sequences are read.
        length: bases of a piece; by default 512 or, if that is less, what the models read at once.

    Raises:
        ValueError: if a value or option does not fit the model.
        OSError: if there is no such model.
        MissingExtraError: if a library for pictures or clusters is not installed.
    """
    from ...support.figures import pyplot

    pyplot()
    check_clustering()
    model = model or ModelOptions()
    config = model.load_config()
    if not says_memory(config):
        raise no_memory(model)
    if fasta is None and twin is not None:
        raise InputError("--twin: readiness is compared on sequences; name a FASTA file, too.")
    if twin is not None:
        _check_twin(config, twin)
    if fasta is not None:
        for each in (model, *(() if twin is None else (twin,))):
            if head_of(each.load_config()) is None:
                raise InputError(
                    f"{model_name(each.model)} predicts no bases, so it has no readiness; leave the FASTA file out."
                )
            length = min(length or LONGEST_PIECE, each.bases_at_once(unknown=LONGEST_PIECE))
        if length is None or length < SHORTEST:
            raise InputError(f"length of a piece: expected at least {SHORTEST} bases, got {length}.")
    path = None if fasta is None else Path(fasta)
    return ExplainModelJob(model, path, twin, permutations, pieces, length or LONGEST_PIECE)
