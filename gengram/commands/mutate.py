"""`gengram mutate`: the effect of every single-base change of a region, as a table and a picture."""

import argparse
from pathlib import Path
from typing import Any

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "change every base of a region: effects on likelihood or a class, and dependencies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram mutate`."""
    parser.add_argument(
        "regions",
        nargs="*",
        metavar="REGION",
        help="a region such as chr9:10,000-10,200 (from 1, with its end), a record's name, or a BED file",
    )
    parser.add_argument("--whole-genome", action="store_true", help="all of the FASTA file, as of short sequences")
    parser.add_argument("--fasta", type=Path, required=True, metavar="GENOME", help="the genome, plain or compressed")
    parser.add_argument("--deletions", action="store_true", help="also delete every single base")
    parser.add_argument(
        "--class", dest="of_class", metavar="CLASS", help="name or number of a class: the effect on a classifier"
    )
    parser.add_argument(
        "--dependency",
        action="store_true",
        help="instead, how much a substitution at one base moves the prediction at each other",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="bases of the window around a region: 512 by default; of a classifier, the region",
    )
    parser.add_argument(
        "--per-window", type=int, metavar="N", help="most bases that share a window; by default half of the context"
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="also draw it: a name in .svg or .png")
    add_job_options(parser, "table to make, in .tsv or .parquet")


def run(arguments: argparse.Namespace) -> int:
    """Compute the effects, and draw them.

    Raises:
        ValueError, OSError: if an input or an option cannot be used.
        MissingExtraError: if a library of the extra `genomics` is not installed.
    """
    from ..inference.jobs import run_job
    from ..inference.jobs.region_tables import finished_table

    job = _job(arguments)
    pictures = {}
    if arguments.image is not None:
        from ..inference.jobs.mutate_picture import draw, pictures_of_job

        if arguments.shard is not None:
            raise ValueError("--image: a part (--shard) has no picture; leave out one of the two.")
        pictures = pictures_of_job(job, arguments.image)
    summary = finished_table(job, arguments.output) if pictures else None  # it is drawn without computing it again
    if summary is None:
        summary = run_job(job, arguments.output, **run_options(arguments))
    if summary.is_written:
        for path, region in pictures.items():
            draw(job, region, path)
    counts = {} if arguments.dependency or not summary.is_written else job.counted()
    words, facts = _said(counts, summary)
    if pictures:
        words[0] += f", and {', '.join(map(str, pictures))}"
    images = [str(path) for path in pictures]
    print_summary(arguments, summary, "\n".join(words), bases=summary.items, **facts, images=images)
    return 0


def _said(counts: dict[str, int], summary: Any) -> tuple[list[str], dict[str, Any]]:
    """Lines and facts of a summary, with the changes of each status if these are counted."""
    from ..sequences.variants import REASONS, SCORED

    if not counts:
        return [f"wrote dependencies of {summary.items:,} bases to {summary.output}"], {}
    unscored = {status: count for status, count in counts.items() if status != SCORED}
    scored, total = counts.get(SCORED, 0), sum(counts.values())
    words = [f"scored {scored:,} of {total:,} changes of {summary.items:,} bases, wrote {summary.output}"]
    words += [f"{count:12,} {status}: {REASONS[status]}" for status, count in unscored.items()]
    return words, {"changes": total, "scored": scored, "not_scored": unscored}


def _job(arguments: argparse.Namespace) -> Any:
    from ..inference.jobs.dependency import dependency_job
    from ..inference.jobs.mutate import mutate_job

    shared = {
        "whole_genome": arguments.whole_genome,
        "model": model_options(arguments),
        "context": arguments.context,
    }
    own = {
        "per_window": arguments.per_window,
        "deletions": arguments.deletions,
        "of_class": arguments.of_class,
    }
    if not arguments.dependency:
        return mutate_job(arguments.fasta, arguments.output, arguments.regions, **shared, **own)
    for name, value in {"--per-window": own["per_window"], "--class": own["of_class"]}.items():
        if value is not None:
            raise ValueError(f"{name}: --dependency has no such choice; leave it out.")
    if arguments.deletions:
        raise ValueError("--deletions: --dependency has no such choice; leave it out.")
    return dependency_job(arguments.fasta, arguments.output, arguments.regions, **shared)
