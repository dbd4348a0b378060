"""`gengram generate`: new sequences, behind prompts or from nothing."""

import argparse
from pathlib import Path

from ..job_options import add_job_options, model_options, print_summary, run_options

HELP = "make new sequences of A, C, G and T, as FASTA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram generate`."""
    parser.add_argument("--prompts", type=Path, metavar="FASTA", help="sequences to continue; without, from nothing")
    parser.add_argument("--number", type=int, default=1, metavar="N", help="sequences for each prompt (%(default)s)")
    parser.add_argument("--length", type=int, default=1000, metavar="N", help="new bases of each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other sequences (%(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 likely bases become likelier, 0 takes the most likely one (%(default)s)",
    )
    parser.add_argument("--top-k", type=int, default=4, metavar="K", help="only the K likeliest bases (%(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only bases that together reach P (%(default)s)"
    )
    parser.add_argument("--only-new", action="store_true", help="leave out the prompts, and write only the new bases")
    add_job_options(
        parser, output="FASTA file to write: .fa, .fasta or .fna, and .gz for a compressed one", strands=False
    )


def run(arguments: argparse.Namespace) -> int:
    """Generate, and say what was written.

    Raises:
        ValueError: if the prompts, the model or an option cannot be used.
        OSError: if a file cannot be read or written.
    """
    from ..inference.generation import Sampling
    from ..inference.jobs.generate import generate_file

    summary = generate_file(
        arguments.output,
        arguments.prompts,
        model=model_options(arguments),
        number=arguments.number,
        length=arguments.length,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
        seed=arguments.seed,
        with_prompt=not arguments.only_new,
        **run_options(arguments),
    )
    sequences = summary.items // arguments.length
    words = f"wrote {sequences:,} sequences with {summary.items:,} new bases to {summary.output}"
    print_summary(arguments, summary, words, sequences=sequences, new_bases=summary.items)
    return 0
