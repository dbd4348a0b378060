"""`gengram fill`: the most likely bases at N, `?` and `[MASK]`."""

import argparse
from pathlib import Path

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "fill gaps of sequences with the most likely bases"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram fill`."""
    parser.add_argument(
        "sequences",
        type=Path,
        metavar="SEQUENCES",
        help="FASTA or FASTQ, also compressed; a gap is N, ? or [MASK]",
    )
    add_job_options(parser, "filled FASTA, such as OUT.fa, with the table OUT.fa.tsv; or OUT.tsv or OUT.parquet alone")
    parser.add_argument(
        "--context", type=int, metavar="N", help="most bases around a gap; by default what the model reads, or 1,024"
    )
    parser.add_argument(
        "--joint",
        type=int,
        default=4,
        metavar="G",
        help="most gaps of a window that are filled together (%(default)s)",
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="where a window has more gaps, fill each together with the nearest ones, reading the others as N",
    )
    parser.add_argument(
        "--longest-run", type=int, default=16, metavar="N", help="longer runs of N are no gaps and stay (%(default)s)"
    )
    parser.add_argument("--codes", action="store_true", help="fill codes such as R, which is A or G, too")
    parser.add_argument(
        "--least-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="leave N where no base reaches P (%(default)s)",
    )
    parser.add_argument(
        "--table", default="tsv", choices=["tsv", "parquet"], help="format of the table beside FASTA (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Fill the gaps, and say how many and which were left.

    Raises:
        ValueError: if the sequences, the model or an option cannot be used.
        OSError: if a file cannot be read, or the output exists.
    """
    from ..inference.filling import STATUSES
    from ..inference.jobs import run_job
    from ..inference.jobs.fill import fill_job

    job = fill_job(
        arguments.sequences,
        arguments.output,
        model=model_options(arguments),
        context=arguments.context,
        joint=arguments.joint,
        nearest=arguments.nearest,
        longest_run=arguments.longest_run,
        with_codes=arguments.codes,
        least_probability=arguments.least_probability,
        table=arguments.table,
    )
    summary = run_job(job, arguments.output, **run_options(arguments))
    lines = [f"wrote {summary.output}: {job.counts.total():,} gaps"]
    lines += [f"{job.counts[status]:12,} {words}" for status, words in STATUSES.items() if job.counts[status]]
    if job.long_runs:
        runs = f"{job.long_runs:,} run{'s' * (job.long_runs != 1)} of more than {job.longest_run:,} N"
        lines.append(f"{runs}, {job.long_run_bases:,} bases, left as they are")
    counts = {status: job.counts[status] for status in STATUSES}
    print_summary(arguments, summary, "\n".join(lines), gaps=counts, long_runs=job.long_runs)
    return 0
