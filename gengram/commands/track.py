"""`gengram track`: surprisal, entropy and the memory's work for every base, as files for a genome browser."""

import argparse
from pathlib import Path

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "values for every base of regions or a genome: bigWig or bedGraph, and a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram track`."""
    parser.add_argument(
        "regions",
        nargs="*",
        metavar="REGIONS",
        help="BED files (.bed, .bed.gz), or regions such as chr9:10,000-20,000 (from 1, with its end)",
    )
    parser.add_argument("--whole-genome", action="store_true", help="all of the FASTA file")
    parser.add_argument("--fasta", type=Path, required=True, metavar="GENOME", help="the genome, plain or compressed")
    parser.add_argument(
        "--values",
        metavar="LIST",
        help="some of surprisal,entropy,gate,residual; by default all that the model has",
    )
    parser.add_argument("--format", default="bigwig", choices=["bigwig", "bedgraph"], help="(%(default)s)")
    parser.add_argument("--context", type=int, metavar="N", help="bases read at once; by default as many as it can")
    parser.add_argument(
        "--overlap", type=int, metavar="N", help="bases that the model sees before each one at least; half the context"
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="also draw the regions: a name in .svg or .png")
    parser.add_argument("--gtf", type=Path, metavar="GENES", help="genes for the picture, GTF or GFF3")
    add_job_options(parser, "folder to make, with a file for each value, layer and strand")


def run(arguments: argparse.Namespace) -> int:
    """Compute the tracks, and draw them.

    Raises:
        ValueError, OSError: if an input or an option cannot be used.
        MissingExtraError: if a library of the extra `genomics` is not installed.
    """
    from ..inference.jobs import run_job
    from ..inference.jobs.track import finished_tracks, track_job

    job = track_job(
        arguments.fasta,
        model_options(arguments),
        arguments.regions,
        arguments.whole_genome,
        arguments.values and [value.strip() for value in arguments.values.split(",")],
        arguments.context,
        arguments.overlap,
        arguments.format,
    )
    pictures = {}
    if arguments.image is not None:
        from ..inference.jobs.track_picture import draw_tracks, plan_pictures, read_genes_of

        if arguments.shard is not None:
            raise ValueError("--image: a part (--shard) has no picture; leave out one of the two.")
        places = plan_pictures(job, arguments.image)
        pictures = {path: (region, read_genes_of(arguments.gtf, region)) for path, region in places.items()}
    elif arguments.gtf is not None:
        raise ValueError("--gtf: genes are drawn only in a picture; add --image FILE.")
    summary = finished_tracks(job, arguments.output) if pictures else None  # they are drawn again without computing
    if summary is None:
        summary = run_job(job, arguments.output, **run_options(arguments))
    if summary.is_written:
        for path, (region, genes) in pictures.items():
            draw_tracks(summary.output, job.fasta, region, path, genes)
    words = f"wrote {len(job.tracks)} tracks of {summary.items:,} bases to {summary.output}"
    if pictures:
        words += f", and {', '.join(map(str, pictures))}"
    print_summary(
        arguments,
        summary,
        words,
        bases=summary.items,
        tracks=[track.name for track in job.tracks],
        images=[str(path) for path in pictures],
    )
    return 0
