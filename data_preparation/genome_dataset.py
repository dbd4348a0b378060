"""FASTA files to a tokenized data set: a folder of Parquet files that `datasets.load_dataset` reads or streams."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, IterableDataset, List, Value

from ..sequences.alphabet import reverse_complement
from ..sequences.fasta import read_fasta
from ..sequences.windows import runs_between_gaps, window_bounds
from ..support.progress import progress_bar
from ..support.whole_output import whole_folder
from ..tokenization.tokenization_gengram import GengramTokenizer
from .leakage import KMER, canonical_kmers, containment, sketch
from .split_rules import EVERYTHING_TRAINS, SplitRule, parts_of_record
from .window_options import WindowOptions

_PIECE = 1 << 20  # bases that are tokenized at once
_ROWS_AT_ONCE = 4096
_BYTES_PER_FILE = 256 << 20


@dataclass
class SplitCount:
    """What went into one split."""

    examples: int = 0
    tokens: int = 0
    bases_left_over: int = 0  # of the last block, or of windows that were too short or not kept
    sketch: list[np.ndarray] = field(default_factory=list, repr=False)


def features(length: int | None = None) -> Features:
    """Columns of a data set: token ids (bytes), and where they are from in the notation of bedtools.

    `origin` is a list, as a packed example may hold several documents: `chr9:1000-2024(+)`, 0-based and half-open on
    the forward strand; on `(-)` the example is the reverse complement of these bases.
    """
    return Features({"input_ids": List(Value("uint8"), length=length or -1), "origin": List(Value("string"))})


def iterate_examples(
    fasta: Sequence[str | Path],
    options: WindowOptions,
    rules: Sequence[SplitRule] = EVERYTHING_TRAINS,
    counts: dict[str, SplitCount] | None = None,
    sketch_scale: int | None = None,
    on_bases: Any = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and example (see `features`) of every example, in the order of the files.

    Args:
        fasta: files, plain, gzip or bgzip.
        options, rules: how sequences are cut, and which part is in which split.
        counts: filled with what each split got, if given.
        sketch_scale: also keep one in so many k-mers of each split in `counts`.
        on_bases: called with a number of bases as they are done, for a progress bar.

    Raises:
        ValueError: if a file is not FASTA, or no rule matches a record.
    """
    counts = {} if counts is None else counts
    tokenizer = GengramTokenizer()
    streams: dict[tuple[str, float], _Stream] = {}
    for path in map(Path, fasta):
        for name, sequence in read_fasta(path):
            for part in parts_of_record(tuple(rules), path.name, name, len(sequence)):
                count = counts.setdefault(part.split, SplitCount())
                stream = streams.get((part.split, part.keep))
                if stream is None:
                    stream = _Stream(options, part.keep, count, np.random.default_rng((options.seed, len(streams))))
                    streams[part.split, part.keep] = stream
                text = sequence[part.start : part.end]
                for start, end in runs_between_gaps(text, options.longest_gap):
                    piece = text[start:end]
                    if sketch_scale:
                        count.sketch.append(sketch(canonical_kmers(piece), sketch_scale))
                    for strand in "+-" if options.both_strands else "+":
                        ids = _token_ids(piece if strand == "+" else reverse_complement(piece), tokenizer)
                        document = _Document(name, part.start + start, part.start + end, strand, ids)
                        for example in stream.examples(document):
                            yield part.split, example
            if on_bases is not None:
                on_bases(len(sequence))
    for stream in streams.values():
        stream.count.bases_left_over += sum(len(ids) for ids, _ in stream.waiting)


def _token_ids(text: str, tokenizer: GengramTokenizer) -> np.ndarray:
    pieces = [
        tokenizer(text[i : i + _PIECE], return_tensors="np")["input_ids"][0] for i in range(0, len(text), _PIECE)
    ]
    return np.concatenate([piece.astype(np.uint8) for piece in pieces])


@dataclass(frozen=True)
class _Document:
    """A piece between gaps, on one strand."""

    record: str
    start: int
    end: int
    strand: str
    ids: np.ndarray

    def origin(self, left: int, right: int) -> str:
        """Place of the tokens `left` to `right` of this document on the forward strand."""
        if self.strand == "+":
            start, end = self.start + left, self.start + right
        else:
            start, end = self.end - right, self.end - left
        return f"{self.record}:{start}-{end}({self.strand})"


class _Stream:
    """Turns documents of one split into examples."""

    def __init__(self, options: WindowOptions, keep: float, count: SplitCount, generator: np.random.Generator):
        self.options, self.keep, self.count, self.generator = options, keep, count, generator
        self.waiting: list[tuple[np.ndarray, str | None]] = []  # of a packed block that is not full yet
        self.end_of_document = np.array([GengramTokenizer().convert_tokens_to_ids("<EOD>")], dtype=np.uint8)

    def examples(self, document: _Document) -> Iterator[dict[str, Any]]:
        make = self._packed if self.options.packed else self._windows
        for ids, origin in make(document):
            if self.keep < 1 and self.generator.random() >= self.keep:
                self.count.bases_left_over += len(ids)
                continue
            self.count.examples += 1
            self.count.tokens += len(ids)
            yield {"input_ids": ids, "origin": origin}

    def _windows(self, document: _Document) -> Iterator[tuple[np.ndarray, list[str]]]:
        options, size = self.options, len(document.ids)
        right = 0
        for left, right in window_bounds(0, size, options.length, options.stride or options.length, options.shortest):
            yield document.ids[left:right], [document.origin(left, right)]
        self.count.bases_left_over += size - right

    def _packed(self, document: _Document) -> Iterator[tuple[np.ndarray, list[str]]]:
        if len(document.ids) < self.options.shortest:
            self.count.bases_left_over += len(document.ids)
            return
        left, size = 0, len(document.ids)
        while left < size:
            missing = self.options.length - sum(len(ids) for ids, _ in self.waiting)
            right = min(left + missing, size)
            self.waiting.append((document.ids[left:right], document.origin(left, right)))
            left = right
            if sum(len(ids) for ids, _ in self.waiting) == self.options.length:
                yield self._block()
        self.waiting.append((self.end_of_document, None))
        if sum(len(ids) for ids, _ in self.waiting) == self.options.length:
            yield self._block()

    def _block(self) -> tuple[np.ndarray, list[str]]:
        ids = np.concatenate([ids for ids, _ in self.waiting])
        origin = [place for _, place in self.waiting if place is not None]
        self.waiting = []
        return ids, origin


def stream_genome_dataset(
    fasta: Sequence[str | Path],
    split: str = "train",
    options: WindowOptions | None = None,
    rules: Sequence[SplitRule] = EVERYTHING_TRAINS,
) -> IterableDataset:
    """One split as an `IterableDataset` that reads the FASTA files as it goes and writes nothing.

    The columns are those of `features`. Each worker of a data loader reads all files and keeps its share, so prefer
    `prepare_genome_dataset` and `load_dataset(folder, streaming=True)` for more than a few passes.
    """
    options = options or WindowOptions()
    return IterableDataset.from_generator(
        _examples_of_split,
        features=features(options.length if options.packed else None),
        gen_kwargs={"fasta": tuple(map(str, fasta)), "split": split, "options": options, "rules": tuple(rules)},
    )


def _examples_of_split(fasta: Sequence[str], split: str, options: WindowOptions, rules: Sequence[SplitRule]) -> Any:
    for found, example in iterate_examples(fasta, options, rules):
        if found == split:
            yield example


def prepare_genome_dataset(
    fasta: Sequence[str | Path],
    output: str | Path,
    options: WindowOptions | None = None,
    rules: Sequence[SplitRule] = EVERYTHING_TRAINS,
    sketch_scale: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a data set that `datasets.load_dataset(output)` reads, cached or streaming; returns its record.

    The folder appears when it is whole. Beside Parquet files it holds `preparation.json`: options, rules, files with
    hashes, what each split got, and, for every split but "train", which share of its 31-mers (either strand) also
    stands in "train".

    Args:
        fasta: files, plain, gzip or bgzip.
        output: a folder that does not exist, or is empty.
        options, rules: how sequences are cut, and which part is in which split.
        sketch_scale: the share of common k-mers is taken of one in so many; 0 leaves it out.
        progress: show a bar.

    Raises:
        ValueError: if a file is not FASTA, no rule matches a record, or nothing is left.
        FileExistsError: if `output` holds something.
    """
    options = options or WindowOptions()
    paths = [Path(path) for path in fasta]
    if not paths:
        raise ValueError("expected at least one FASTA file, got none.")
    counts: dict[str, SplitCount] = {}
    schema = features(options.length if options.packed else None).arrow_schema
    with whole_folder(output) as folder, progress_bar(None, "bp", shown=progress) as bar:
        writers: dict[str, _ParquetShards] = {}
        try:
            for split, example in iterate_examples(paths, options, rules, counts, sketch_scale or None, bar.update):
                if split not in writers:
                    writers[split] = _ParquetShards(folder / "data", split, schema)
                writers[split].add(example)
            if not writers:
                raise ValueError(f"nothing is left of {', '.join(map(str, paths))}: no piece is long enough or kept.")
        finally:
            for writer in writers.values():
                writer.close()
        for writer in writers.values():
            writer.number_files()
        record = {
            "options": asdict(options),
            "rules": [asdict(rule) for rule in rules],
            "files": [{"name": path.name, "sha256": _sha256(path)} for path in paths],
            "splits": {
                split: {
                    "examples": count.examples,
                    "tokens": count.tokens,
                    "bases_left_over": count.bases_left_over,
                }
                for split, count in counts.items()
            },
        }
        if sketch_scale and "train" in counts:
            record[f"share_of_{KMER}mers_also_in_train"] = _leakage(counts)
        (folder / "preparation.json").write_text(json.dumps(record, indent=1) + "\n")
        digests = [_sha256(path) for path in sorted((folder / "data").iterdir())]
        content = hashlib.sha256("".join(digests).encode()).hexdigest()
        (folder / "README.md").write_text(_card(record, sorted(writers), content))
    return record


class _ParquetShards:
    """Writes the examples of one split, in files of bounded size."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema):
        self.folder, self.split, self.schema = folder, split, schema
        self.rows: list[dict[str, Any]] = []
        self.writer: pq.ParquetWriter | None = None
        self.files: list[Path] = []
        self.bytes_in_file = 0
        folder.mkdir(exist_ok=True)

    def add(self, example: dict[str, Any]) -> None:
        self.rows.append(example)
        if len(self.rows) >= _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        ids = [row["input_ids"] for row in self.rows]
        flat = pa.array(np.concatenate(ids))
        ids_type = self.schema.field("input_ids").type
        if pa.types.is_fixed_size_list(ids_type):
            tokens: pa.Array = pa.FixedSizeListArray.from_arrays(flat, type=ids_type)
        else:
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int32)
            tokens = pa.ListArray.from_arrays(pa.array(offsets), flat, type=ids_type)
        origin = pa.array([row["origin"] for row in self.rows], type=self.schema.field("origin").type)
        if self.writer is None or self.bytes_in_file > _BYTES_PER_FILE:
            self.close_file()
            self.files.append(self.folder / f"{self.split}-{len(self.files):05d}.parquet")
            self.writer = pq.ParquetWriter(self.files[-1], self.schema, compression="zstd")
        self.writer.write_table(pa.Table.from_arrays([tokens, origin], schema=self.schema))
        self.bytes_in_file += len(flat)
        self.rows = []

    def close_file(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer, self.bytes_in_file = None, 0

    def close(self) -> None:
        self.flush()
        self.close_file()

    def number_files(self) -> None:
        """Name the files as the Hub does, `train-00000-of-00002.parquet`."""
        for path in self.files:
            path.rename(path.with_name(f"{path.stem}-of-{len(self.files):05d}.parquet"))


def _leakage(counts: dict[str, SplitCount]) -> dict[str, float]:
    sketches = {
        split: np.unique(np.concatenate(count.sketch)) if count.sketch else np.empty(0, dtype=np.uint64)
        for split, count in counts.items()
    }
    return {split: containment(found, sketches["train"]) for split, found in sketches.items() if split != "train"}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _card(record: dict[str, Any], splits: list[str], content: str) -> str:
    """The data set's card; it holds the hash of the content, by which `datasets` tells folders of one name apart.

    Its cache goes by the folder's name and this card's head, and would serve what another such folder held.
    """
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits)
    rows = "\n".join(
        f"| {split} | {count['examples']:,} | {count['tokens']:,} |" for split, count in record["splits"].items()
    )
    return (
        f"---\nconfigs:\n- config_name: default\n  description: sha256 {content}\n  data_files:\n{files}\n"
        "tags:\n- dna\n- gengram\n---\n\n"
        "# Tokenized DNA\n\nMade by `gengram prepare`; `preparation.json` says from what and how. `input_ids` are "
        "token ids of `GengramTokenizer`, `origin` the bases they are from (0-based, half-open, forward strand; on "
        f"`(-)` the example is their reverse complement).\n\n| split | examples | tokens |\n|---|---|---|\n{rows}\n"
    )
