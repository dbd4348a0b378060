"""`gengram explain`: which k-mers made what a model does in a region, as one report and tables."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "which k-mers of the memory made what a model does: a report, and tables"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram explain`."""
    parser.add_argument(
        "regions",
        nargs="*",
        metavar="REGIONS|SEQUENCES",
        help="regions such as chr9:10,000-10,100 (from 1, with their end) or BED files; or a FASTA file of sequences",
    )
    parser.add_argument("--fasta", type=Path, metavar="GENOME", help="the genome that regions are of")
    parser.add_argument("--gtf", type=Path, metavar="GENES", help="genes for the pictures, GTF or GFF3")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="bases of the window around a region: 512 by default; of a classifier, the region",
    )
    parser.add_argument("--class", dest="of_class", metavar="CLASS", help="name or number of a classifier's class")
    parser.add_argument(
        "--knock-out", metavar="KMERS", help="also without the rows of these k-mers, such as TATAAA,TATATA"
    )
    parser.add_argument(
        "--knock-out-reverse-complement", action="store_true", help="and without those of their reverse complements"
    )
    parser.add_argument(
        "--jaspar",
        nargs="?",
        const="all",
        metavar="TAXON",
        help="compare with known motifs: vertebrates, fungi, plants, ...; all by default",
    )
    parser.add_argument(
        "--model-only",
        action="store_true",
        help="no regions: what the memory learned, and with a FASTA file how early the model knows its prediction",
    )
    parser.add_argument("--twin", metavar="MODEL", help="with --model-only: the same model trained without its memory")
    parser.add_argument("--no-mutate", action="store_true", help="do not change every base, which takes longest")
    add_job_options(parser, "folder to make, with report.html, tables and pictures")


def run(arguments: argparse.Namespace) -> int:
    """Explain the regions and write the report.

    Raises:
        ValueError, OSError: if an input or an option cannot be used.
        MissingExtraError: if a library for pictures, genomes or motifs is not installed.
    """
    from ..inference.jobs import run_job

    if arguments.shard is not None:
        raise ValueError("--shard: a part has no report; leave it out.")
    job = _model_job(arguments) if arguments.model_only else _job(arguments)
    summary = run_job(job, arguments.output, **run_options(arguments))
    report = summary.output / "report.html"
    if arguments.model_only:
        print_summary(arguments, summary, f"explained the memory, wrote {report}", report=str(report))
        return 0
    words = f"explained {summary.items:,} bases, wrote {report}"
    print_summary(arguments, summary, words, bases=summary.items, report=str(report), targets=list(job.targets))
    return 0


def _model_job(arguments: argparse.Namespace) -> Any:
    from ..inference.jobs.explain_model import explain_model_job

    of_regions = ("gtf", "context", "of_class", "knock_out", "knock_out_reverse_complement", "jaspar", "no_mutate")
    for name in of_regions:
        if getattr(arguments, name):
            option = "class" if name == "of_class" else name.replace("_", "-")
            raise ValueError(f"--{option} is of regions; leave it out with --model-only.")
    if arguments.strands != "both":
        raise ValueError("--strands is of regions; leave it out with --model-only.")
    given = [*arguments.regions, *([] if arguments.fasta is None else [arguments.fasta])]
    if len(given) > 1:
        words = " ".join(map(str, given))
        raise ValueError(f"--model-only: expected one FASTA file of sequences at most, got {words}.")
    options = model_options(arguments)
    twin = None if arguments.twin is None else replace(options, model=arguments.twin, revision=None)
    return explain_model_job(given[0] if given else None, model=options, twin=twin)


def _job(arguments: argparse.Namespace) -> Any:
    from ..inference.jobs.explain import explain_job

    if arguments.twin is not None:
        raise ValueError("--twin belongs to --model-only.")
    fasta, regions = arguments.fasta, arguments.regions
    if fasta is None:
        if len(regions) == 1 and "." in regions[0] and ":" not in regions[0] and not Path(regions[0]).exists():
            raise FileNotFoundError(f"{regions[0]}: no such file.")
        if len(regions) != 1 or not Path(regions[0]).is_file():
            given = " ".join(regions) or "nothing"
            raise ValueError(f"expected one FASTA file of sequences, or regions with --fasta GENOME; got {given}.")
        fasta, regions = Path(regions[0]), []
    elif not regions:
        raise ValueError(
            f"expected regions of {fasta}, such as chr9:10,000-10,100, or BED files; or sequences without --fasta: "
            "gengram explain FILE."
        )
    words = [] if arguments.knock_out is None else arguments.knock_out.split(",")
    return explain_job(
        fasta,
        arguments.output,
        regions,
        whole_genome=not regions and arguments.fasta is None,
        model=model_options(arguments),
        gtf=arguments.gtf,
        context=arguments.context,
        of_class=arguments.of_class,
        knock_out=words,
        reverse_complements=arguments.knock_out_reverse_complement,
        mutates=not arguments.no_mutate,
        jaspar=arguments.jaspar,
    )
