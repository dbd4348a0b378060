"""`gengram demo`: the jobs at work, on a piece of human genome that the package brings or on the user's sequences."""

import argparse
import contextlib
import csv
import gzip
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .. import DEMO_DATA

HELP = "see the jobs at work, on a piece of human genome or on your own sequences"
RECORD, START, END = "chr21_25.7M", 33_000, 37_000  # where ATP5J and GABPA begin; 0-based and half-open
MOST_RECORDS = 8
LONGEST = 5_000  # bases of each record of the user's file
PROMPT = 200  # bases before what is generated


class Step(NamedTuple):
    """A command that is run, and what is shown of its result.

    Args:
        title: what it does.
        words: of the command line, without `gengram`; `@name` is a file in the demo's folder.
        show: prints what came of it, given the folder.
    """

    title: str
    words: tuple[str, ...]
    show: Callable[[Path], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram demo`."""
    parser.add_argument("--fasta", type=Path, help="use these sequences, plain or compressed, and not the example")
    parser.add_argument("--output", type=Path, help="keep the example and all results in this folder")


def run(arguments: argparse.Namespace) -> int:
    """Run the jobs one after the other; what needs a library that is not installed is left out and named.

    Raises:
        ValueError, OSError: if the FASTA file cannot be used, or the folder holds something.
    """
    from ..support.errors import MissingExtraError

    with _folder(arguments.output) as folder, _quiet_loading():
        steps = _example_steps(folder) if arguments.fasta is None else _steps_of_user(arguments.fasta, folder)
        for number, step in enumerate(steps, start=1):
            print(f"\n{number}. {step.title}\n   $ gengram {' '.join(word.removeprefix('@') for word in step.words)}")
            try:
                _run_command([str(folder / word[1:]) if word.startswith("@") else word for word in step.words])
                step.show(folder)
            except MissingExtraError as error:
                print(f"   left out: {error}")
    kept = f"All files are in {arguments.output}. " if arguments.output else ""
    print(f"\nDone. {kept}gengram-mini is small: it shows how the jobs work, and is not for conclusions.")
    return 0


@contextlib.contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """The demo's folder: a new or empty one, or one that is removed in the end."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="gengram-demo-") as temporary:
            yield Path(temporary)
        return
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise FileExistsError(f"{output} holds something already; choose another folder or remove it first.")
    yield output


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the library's progress bars and load reports; the base model would report the head it leaves out."""
    from transformers import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _run_command(words: list[str]) -> None:
    name, *rest = words
    command: Any = import_module(f".{name}", __package__)
    parser = argparse.ArgumentParser(prog=f"gengram {name}")
    command.add_arguments(parser)
    command.run(parser.parse_args(rest))


# ---- on the example


def _example_steps(folder: Path) -> list[Step]:
    """The steps on a part of the example, all of which is put into the folder."""
    print(
        "gengram-mini, the model that ships with the package, on 4,000 bases of human chromosome 21 that it never\n"
        "read in training. The genes ATP5J (today ATP5PF) and GABPA begin there, one on either strand."
    )
    for path in DEMO_DATA.glob("region.*"):
        shutil.copyfile(path, folder / path.name)
    _write_variants(folder)
    _write_exons(folder)
    genome = ("--fasta", "@region.fa.gz")
    region = f"{RECORD}:{START + 1:,}-{END:,}"
    return [
        Step(
            "Score variants: how likely they make the sequence",
            ("score", "@variants.vcf", *genome, "--output", "@scores.tsv"),
            _show_scores,
        ),
        Step(
            "Embed exons: a vector for each",
            ("embed", "@exons.bed", *genome, "--output", "@exons.parquet"),
            lambda folder: _show_embeddings(folder / "exons.parquet"),
        ),
        Step(
            "Draw tracks: how surprising each base is, and what the memory does there",
            ("track", region, *genome, "--gtf", "@region.gtf.gz", "--output", "@tracks", "--image", "@tracks.svg"),
            lambda folder: _show_tracks(folder, [(RECORD, START, END)]),
        ),
        _generation(folder, "region.fa.gz"),
        Step(
            "Convert a checkpoint of the authors' Megatron code, here a tiny one with random weights",
            ("convert", "to-hf", str(DEMO_DATA / "tiny_checkpoint"), "@gengram-tiny", "--quiet"),
            _show_difference_from_the_authors,
        ),
    ]


def _write_variants(folder: Path) -> None:
    with gzip.open(DEMO_DATA / "region.vcf.gz", "rt") as whole, (folder / "variants.vcf").open("w") as part:
        part.writelines(line for line in whole if line.startswith("#") or START < int(line.split("\t")[1]) <= END)


def _write_exons(folder: Path) -> None:
    from ..sequences.annotation import read_genes

    with (folder / "exons.bed").open("w") as file:
        for gene in read_genes(DEMO_DATA / "region.gtf.gz", RECORD, START, END):
            for number, (start, end) in enumerate(gene.exons, start=1):
                if START <= start and end <= END:
                    print(RECORD, start, end, f"{gene.name}.{number}", 0, gene.strand, sep="\t", file=file)


def _show_scores(folder: Path) -> None:
    with (folder / "scores.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            words = "less likely" if float(row["llr"]) < 0 else "more likely"
            place = f"{row['chrom']}:{int(row['pos']):,}"
            print(f"   {place} {row['ref']}>{row['alt']}: llr {float(row['llr']):+.2f}, {words} than the reference")


def _show_difference_from_the_authors(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    converted: Any = AutoModelForCausalLM.from_pretrained(folder / "gengram-tiny", dtype=torch.float32)
    reference = load_file(DEMO_DATA / "reference_logits.safetensors")
    with torch.no_grad():
        logits = converted(reference["input_ids"]).logits
    difference = (logits - reference["logits"]).abs().max()
    print(f"   {type(converted).__name__}, memory layers {converted.config.memory_layers}")
    print(f"   largest difference from the logits of the authors' code: {difference:.1e}")


# ---- on the user's sequences


def _steps_of_user(fasta: Path, folder: Path) -> list[Step]:
    """The steps on the first records of a FASTA file, of which a copy is put into the folder."""
    lengths = _copy_beginnings(fasta, folder / "sequences.fa")
    return [
        Step(
            "Embed the sequences: a vector for each",
            ("embed", "@sequences.fa", "--output", "@sequences.parquet"),
            lambda folder: _show_embeddings(folder / "sequences.parquet"),
        ),
        Step(
            "Draw tracks: how surprising each base is, and what the memory does there",
            ("track", "--whole-genome", "--fasta", "@sequences.fa", "--output", "@tracks", "--image", "@tracks.svg"),
            lambda folder: _show_tracks(folder, [(name, 0, length) for name, length in lengths.items()]),
        ),
        _generation(folder, "sequences.fa"),
    ]


def _copy_beginnings(fasta: Path, copy: Path) -> dict[str, int]:
    """Copy the first bases of the first records, and say what is left out; lengths of the copies by name."""
    from ..sequences.fasta import read_fasta

    lengths: dict[str, int] = {}
    print(f"gengram-mini, the model that ships with the package, on the first sequences of {fasta}:")
    with copy.open("w") as file:
        for name, sequence in itertools.islice(read_fasta(fasta), MOST_RECORDS + 1):
            if len(lengths) == MOST_RECORDS:
                print(f"   records after the first {MOST_RECORDS} are left out")
            elif sequence:
                lengths[name] = min(len(sequence), LONGEST)
                print(f">{name}\n{sequence[:LONGEST]}", file=file)
                part = "" if len(sequence) <= LONGEST else f", of which the first {LONGEST:,} are used"
                print(f"   {name}: {len(sequence):,} bases{part}")
    if not lengths:
        raise ValueError(f"{fasta}: expected at least one record with a sequence")
    return lengths


# ---- for both


def _generation(folder: Path, sequences: str) -> Step:
    """Continue the beginning of the first sequence."""
    from ..sequences.fasta import read_fasta

    name, sequence = next(read_fasta(folder / sequences))
    (folder / "prompt.fa").write_text(f">{name}\n{sequence[:PROMPT]}\n")
    return Step(
        "Generate: continue a sequence",
        ("generate", "--prompts", "@prompt.fa", "--length", "60", "--only-new", "--output", "@generated.fa"),
        lambda folder: print("   " + (folder / "generated.fa").read_text().replace("\n", "\n   ").rstrip()),
    )


def _show_embeddings(path: Path) -> None:
    import pyarrow.parquet

    for row in pyarrow.parquet.read_table(path).to_pylist():
        numbers = ", ".join(f"{value:+.3f}" for value in row["embedding"][:4])
        place = f"{row['name']}:{row['start'] + 1:,}-{row['end']:,}"
        print(f"   {place}: {len(row['embedding'])} numbers [{numbers}, ...]")


def _show_tracks(folder: Path, regions: list[tuple[str, int, int]]) -> None:
    import numpy as np

    from ..inference.jobs.track_files import read_track

    tracks = json.loads((folder / "tracks" / "record.json").read_text())["tracks"]
    print("   means (of surprisal and entropy 2 is chance, and less is more like what the model knows):")
    for value, found in itertools.groupby(tracks, key=lambda track: track["value"]):
        files = [folder / "tracks" / track["file"] for track in found]
        numbers = np.concatenate([read_track(file, *region) for file in files for region in regions])
        mean = np.nanmean(numbers) if np.isfinite(numbers).any() else np.nan
        print(f"   {value}: {mean:.3f}")
