"""`gengram score`: the effect of every variant of a file, as a model sees it."""

import argparse
from pathlib import Path

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "score variants: VCF, BCF or a table in, the same with scores out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram score`."""
    parser.add_argument(
        "variants",
        type=Path,
        metavar="VARIANTS",
        help="VCF, VCF.gz or BCF; or a TSV, CSV or Parquet table with the columns chrom, pos (from 1), ref, alt",
    )
    parser.add_argument("--fasta", type=Path, required=True, metavar="GENOME", help="the genome, plain or compressed")
    parser.add_argument(
        "--context",
        type=int,
        default=512,
        metavar="N",
        help="bases of the window around a variant (%(default)s)",
    )
    parser.add_argument(
        "--regions",
        nargs="+",
        metavar="REGION",
        help="only variants whose first base lies in these: chr20:1,000-2,000 (from 1), or BED files",
    )
    parser.add_argument(
        "--scores",
        metavar="LIST",
        help="some of llr,jsd,embedding,memory; by default all that the model has",
    )
    add_job_options(parser, "file to make, in .vcf, .vcf.gz, .tsv or .parquet")


def run(arguments: argparse.Namespace) -> int:
    """Score the variants, and say how many were not scored and why.

    Raises:
        ValueError, OSError: if an input or an option cannot be used.
        MissingExtraError: if a library of the extra `genomics` is not installed.
    """
    from ..inference.jobs import run_job
    from ..inference.jobs.regions import texts_and_beds
    from ..inference.jobs.score import ScoreJob
    from ..sequences.variants import REASONS, SCORED

    scores = None if arguments.scores is None else tuple(name.strip() for name in arguments.scores.split(","))
    texts, beds = texts_and_beds(arguments.regions) if arguments.regions else ((), ())
    job = ScoreJob(
        arguments.variants,
        arguments.fasta,
        arguments.output,
        model_options(arguments),
        arguments.context,
        scores,
        texts,
        beds,
    )
    summary = run_job(job, arguments.output, **run_options(arguments))
    unscored = {status: count for status, count in job.counts.most_common() if status != SCORED}
    total = job.counts.total()
    words = [f"scored {job.counts[SCORED]:,} of {total:,} alternative alleles, wrote {summary.output}"]
    words += [f"{count:12,} {status}: {REASONS[status]}" for status, count in unscored.items()]
    if job.left_out:
        words.append(f"left out {job.left_out:,} records outside --regions")
    found = {"alleles": total, "scored": job.counts[SCORED], "not_scored": unscored, "records_left_out": job.left_out}
    print_summary(arguments, summary, "\n".join(words), **found)
    return 0
