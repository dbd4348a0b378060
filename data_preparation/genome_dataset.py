"""FASTA files to a tokenized data set: a folder of Parquet files that `datasets.load_dataset` reads or streams."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, List, Value

from ..support.errors import InputError
from ..support.file_hash import sha256_of
from ..support.input_file import is_read_once, shown_name
from ..support.progress import progress_bar
from ..support.whole_output import whole_folder
from .leakage import KMER, shares_in
from .parquet_shards import ParquetShards
from .preparation import Preparation, iterate_examples
from .split_rules import EVERYTHING_TRAINS, SplitRule
from .window_options import WindowOptions

_EXAMPLES_PER_LOOK = 4096  # after which the progress bar says how many there are


def features(length: int | None = None) -> Features:
    """Columns of a data set: token ids (bytes), and where they are from in the notation of bedtools.

    `origin` is a list, as a packed example may hold several documents: `chr9:1000-2024(+)`, 0-based and half-open on
    the forward strand; on `(-)` the example is the reverse complement of these bases.
    """
    return Features({"input_ids": List(Value("uint8"), length=length or -1), "origin": List(Value("string"))})


def stream_genome_dataset(
    fasta: Sequence[str | Path],
    split: str = "train",
    options: WindowOptions | None = None,
    rules: Sequence[SplitRule] = EVERYTHING_TRAINS,
) -> IterableDataset:
    """One split as an `IterableDataset` that reads the FASTA files as it goes and writes nothing.

    The columns are those of `features`. One worker of a data loader reads all files, and others have nothing to do, so
    prefer `prepare_genome_dataset` and `load_dataset(folder, streaming=True)` for more than a few passes.

    Raises:
        InputError: if a file can be read only once, as pipes; and while it is read, as `prepare_genome_dataset`.
    """
    options = options or WindowOptions()
    for path in fasta:
        if is_read_once(path):
            raise InputError(
                f"{shown_name(path)} can be read only once, a streamed data set reads it in every pass; use "
                "prepare_genome_dataset, or save it as a file."
            )
    return IterableDataset.from_generator(
        _examples_of_split,
        features=features(options.length if options.packed else None),
        gen_kwargs={"fasta": tuple(map(str, fasta)), "split": split, "options": options, "rules": tuple(rules)},
    )


def _examples_of_split(fasta: Sequence[str], split: str, options: WindowOptions, rules: Sequence[SplitRule]) -> Any:
    for found, example in iterate_examples(fasta, options, Preparation(rules)):
        if found == split:
            yield example


def prepare_genome_dataset(
    fasta: Sequence[str | Path],
    output: str | Path,
    options: WindowOptions | None = None,
    rules: Sequence[SplitRule] = EVERYTHING_TRAINS,
    sketch_scale: int = 16,
    progress: bool = True,
    restart: bool | None = None,
) -> dict[str, Any]:
    """Write a data set that `datasets.load_dataset(output)` reads, cached or streaming; returns its record.

    The folder appears when it is whole. Beside Parquet files it holds `preparation.json`: options, rules and those of
    them about no base at all; of each file its hash and its letters by kind; what each split got; and, for every split
    but "train", which share of its 31-mers (either strand) also stands in "train".

    Files are read once, so pipes and standard input (`-`) work. Memory stays below about 0.7 GB for files of any size,
    and some 150 bytes for each record's name; documents of more than 16 million bases lie on the disk meanwhile.

    Args:
        fasta: files, plain or compressed.
        output: a folder that does not exist, or is empty.
        options, rules: how sequences are cut, and which part is in which split.
        sketch_scale: the share of common k-mers is taken of one in so many, or of fewer if there are very many; 0
            leaves it out.
        progress: show a bar.
        restart: delete what an earlier run into `output` left when it was killed; otherwise that is an error.

    Raises:
        InputError: if a file is not FASTA or not DNA, names a record twice, no rule matches a record, nothing is left,
            or another run writes `output` or left it unfinished.
        FileExistsError: if `output` holds something.
        OSError: if a file cannot be read or written, as on a full disk.
    """
    options = options or WindowOptions()
    if not fasta:
        raise InputError("expected at least one FASTA file, got none.")
    preparation = Preparation(rules, sketch_scale or None)
    schema = features(options.length if options.packed else None).arrow_schema
    with whole_folder(output, restart) as folder, progress_bar("read", "bp", shown=progress) as bar:
        shards: dict[str, ParquetShards] = {}
        try:
            examples = iterate_examples(fasta, options, preparation, bar.update, folder)
            for number, (split, example) in enumerate(examples):
                if number % _EXAMPLES_PER_LOOK == 0:  # a chromosome is read in a moment, and its examples take long
                    bar.set_postfix_str(f"{number:,} examples")
                if split not in shards:
                    shards[split] = ParquetShards(folder / "data", split, schema)
                shards[split].add(example)
            if not shards:
                names = ", ".join(map(shown_name, fasta))
                raise InputError(f"nothing is left of {names}: no piece is long enough or kept.")
            for shard in shards.values():
                shard.finish()
        finally:
            for shard in shards.values():
                shard.abandon()
        record = _record(preparation, options)
        (folder / "preparation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        digests = [sha256_of(path) for path in sorted((folder / "data").iterdir())]
        content = hashlib.sha256("".join(digests).encode()).hexdigest()
        (folder / "README.md").write_text(_card(record, sorted(shards), content), encoding="utf-8")
    return record


def _record(preparation: Preparation, options: WindowOptions) -> dict[str, Any]:
    """What `preparation.json` holds."""
    record: dict[str, Any] = {
        "options": asdict(options),
        "rules": [asdict(rule) for rule in preparation.rules],
        "unused_rules": [asdict(rule) for rule in preparation.unused_rules],
        "files": [
            {
                "name": file.name,
                "sha256": file.sha256,
                "records": file.records,
                "empty_records": file.empty_records,
                "bases": file.letters.bases,
                "n": file.letters.unknown,
                "other_iupac_codes": file.letters.ambiguous,
                "foreign_characters": dict(file.letters.foreign.most_common()),
            }
            for file in preparation.files
        ],
        "splits": {split: asdict(count) for split, count in preparation.splits.items()},
    }
    train = preparation.sketches.get("train")
    if train is not None:
        others = {split: sketch for split, sketch in preparation.sketches.items() if split != "train"}
        shares = {split: share for split, share in shares_in(train, others).items() if not math.isnan(share)}
        record[f"share_of_{KMER}mers_also_in_train"] = shares
    return record


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
