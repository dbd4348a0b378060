"""`gengram embed`: a vector for each sequence, or for each base."""

import argparse
from pathlib import Path
from typing import Any

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "embed sequences or regions of a genome: a vector for each, or for each base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram embed`."""
    parser.add_argument(
        "sequences",
        type=Path,
        metavar="SEQUENCES",
        help="FASTA or FASTQ, also compressed; a table (CSV, TSV, Parquet) with a column of sequences; or BED",
    )
    add_job_options(parser, "OUT.parquet, OUT.npz or OUT.h5ad, with name, start, end, strand and embedding")
    parser.add_argument(
        "--fasta", type=Path, metavar="GENOME", help="the genome that the regions of a BED file are of"
    )
    parser.add_argument(
        "--layer", type=int, default=-1, metavar="L", help="0 is the embedding, -1 the last (%(default)s)"
    )
    parser.add_argument(
        "--pooling",
        default="mean",
        choices=["mean", "max", "last", "centre", "none"],
        help="over the bases of a sequence; none gives a row for each base (%(default)s)",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="bases read at once; by default what the model can read"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="bases that two windows of a longer sequence share; by default half the context",
    )
    parser.add_argument(
        "--sequence-column", default="sequence", metavar="NAME", help="of a table: what holds sequences (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Embed the sequences and say what was read.

    Raises:
        ValueError: if the input, the model or an option cannot be used.
        OSError: if a file or model cannot be read, or the output exists.
        MissingExtraError: if a library for the genome or the output is not installed.
    """
    from ..inference.jobs import run_job
    from ..inference.jobs.embed import embed_job

    job = embed_job(
        arguments.sequences,
        arguments.output,
        arguments.fasta,
        model=model_options(arguments),
        layer=arguments.layer,
        pooling=arguments.pooling,
        context=arguments.context,
        overlap=arguments.overlap,
        sequence_column=arguments.sequence_column,
    )
    summary = run_job(job, arguments.output, **run_options(arguments))
    print_summary(arguments, summary, _words(job, summary), **vars(job.notes))
    return 0


def _words(job: Any, summary: Any) -> str:
    """What was read and written, and what a reader of the numbers should know."""
    notes = job.notes
    lines = [
        f"wrote {summary.output}: {notes.sequences:,} sequence{'s' * (notes.sequences != 1)} of {notes.bases:,} bases"
    ]
    if notes.in_windows:
        lines.append(
            f"{notes.in_windows:,} longer than the context of {job.context:,} bases: read in windows that overlap by "
            f"{job.overlap:,}"
        )
    if notes.uncertain_bases:
        lines.append(f"{notes.uncertain_bases:,} bases are N or another code of several bases: all were read as N")
    if notes.only_uncertain:
        lines.append(f"{notes.only_uncertain:,} without any A, C, G or T: their vectors say nothing about DNA")
    return "\n".join(lines)
