"""`gengram prepare`: FASTA files to a tokenized data set."""

import argparse
import json
from pathlib import Path

HELP = "FASTA files to a tokenized data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram prepare`."""
    from ..data_preparation.window_options import WindowOptions

    defaults = WindowOptions()
    parser.add_argument("fasta", nargs="+", type=Path, help="FASTA files, plain, gzip or bgzip")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; load_dataset reads it")
    parser.add_argument(
        "--splits",
        type=Path,
        help="tab-separated table: pattern of FILE:RECORD, split (- drops), and optionally start, end, keep; the "
        "first line that matches wins. Without it all is 'train'",
    )
    parser.add_argument("--length", type=int, default=defaults.length, help="tokens of an example (%(default)s)")
    parser.add_argument("--stride", type=int, help="distance of two windows in bases; by default their length")
    parser.add_argument("--packed", action="store_true", help="fill every example, documents ended by <EOD>")
    parser.add_argument("--both-strands", action="store_true", help="add the reverse complement")
    parser.add_argument(
        "--longest-gap", type=int, default=defaults.longest_gap, help="cut out runs of more N than this (%(default)s)"
    )
    parser.add_argument(
        "--shortest", type=int, default=defaults.shortest, help="leave out pieces of fewer bases (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the draw for 'keep' (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON, and no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Write the data set, and say what went into each split.

    Raises:
        ValueError: if options contradict each other, a file is not FASTA, or a table of splits cannot be read.
        OSError: if a file cannot be read, or the output holds something.
    """
    from ..data_preparation.genome_dataset import prepare_genome_dataset
    from ..data_preparation.split_rules import EVERYTHING_TRAINS, read_split_rules
    from ..data_preparation.window_options import WindowOptions

    options = WindowOptions(
        length=arguments.length,
        stride=arguments.stride,
        packed=arguments.packed,
        both_strands=arguments.both_strands,
        longest_gap=arguments.longest_gap,
        shortest=arguments.shortest,
        seed=arguments.seed,
    )
    rules = read_split_rules(arguments.splits) if arguments.splits else EVERYTHING_TRAINS
    record = prepare_genome_dataset(arguments.fasta, arguments.output, options, rules, progress=not arguments.json)
    if arguments.json:
        print(json.dumps(record, indent=1))
        return 0
    for split, count in record["splits"].items():
        print(f"{split:12} {count['examples']:>10,} examples {count['tokens']:>14,} tokens")
    for name, shares in record.items():
        if name.startswith("share_of_"):
            for split, share in shares.items():
                print(f"{split:12} {share:.2%} of its 31-mers also stand in train")
    print(f"wrote {arguments.output}; datasets.load_dataset({str(arguments.output)!r}) reads it")
    return 0
