"""`gengram prepare`: FASTA files to a tokenized data set."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELP = "FASTA files to a tokenized data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram prepare`."""
    from ..data_preparation.window_options import FOREIGN, REPEATED_NAMES, WindowOptions

    defaults = WindowOptions()
    parser.add_argument(
        "fasta",
        nargs="+",
        help="FASTA files or pipes, plain or compressed (gzip, bgzip, bzip2, xz); - is standard input",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; load_dataset reads it")
    parser.add_argument(
        "--splits",
        type=Path,
        help="tab-separated table: pattern of FILE:RECORD (stdin:RECORD), split (- drops), and optionally start, end, "
        "keep; the first line that matches wins. Without it all is 'train'",
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
    parser.add_argument(
        "--foreign",
        choices=FOREIGN,
        default=defaults.foreign,
        help="characters that are no IUPAC codes of DNA: limit cuts them out, but refuses a file with more than "
        "--most-foreign; cut cuts them out; keep makes them [UNK]; fail refuses the first (%(default)s)",
    )
    parser.add_argument(
        "--most-foreign", type=float, default=defaults.most_foreign, help="share of a file's letters (%(default)s)"
    )
    parser.add_argument(
        "--repeated-names",
        choices=REPEATED_NAMES,
        default=defaults.repeated_names,
        help="records of one file that have one name: fail, or number them, NAME#2 (%(default)s)",
    )
    parser.add_argument("--restart", action="store_true", help="delete what an earlier run left when it was killed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    how.add_argument("--json", action="store_true", help="print the record as JSON, and no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Write the data set, and say what was read and what went into each split.

    Raises:
        ValueError: if options contradict each other, a file is not FASTA or not DNA, a table of splits cannot be read,
            or another run writes the output or left it unfinished.
        OSError: if a file cannot be read or written, or the output holds something.
    """
    from ..data_preparation.genome_dataset import prepare_genome_dataset
    from ..data_preparation.split_rules import EVERYTHING_TRAINS, read_split_rules
    from ..data_preparation.window_options import WindowOptions
    from ..support.printable import printable

    options = WindowOptions(
        length=arguments.length,
        stride=arguments.stride,
        packed=arguments.packed,
        both_strands=arguments.both_strands,
        longest_gap=arguments.longest_gap,
        shortest=arguments.shortest,
        seed=arguments.seed,
        foreign=arguments.foreign,
        most_foreign=arguments.most_foreign,
        repeated_names=arguments.repeated_names,
    )
    rules = read_split_rules(arguments.splits) if arguments.splits else EVERYTHING_TRAINS
    record = prepare_genome_dataset(
        arguments.fasta,
        arguments.output,
        options,
        rules,
        progress=not (arguments.json or arguments.quiet),
        restart=arguments.restart,
    )
    if arguments.json:
        print(json.dumps(record, indent=1))
    if arguments.json or arguments.quiet:
        return 0
    for line in _summary(record):
        print(line)
    output = printable(arguments.output, most=4096)
    print(f"wrote {output}; datasets.load_dataset({output!r}) reads it")
    return 0


def _summary(record: dict[str, Any]) -> Iterator[str]:
    """Lines about files, what was not used, and splits."""
    from ..support.printable import printable

    for file in record["files"]:
        foreign = file["foreign_characters"]
        counts = {"N": file["n"], "other IUPAC codes": file["other_iupac_codes"], "foreign": sum(foreign.values())}
        parts = [f"{file['records']:,} records", f"{file['bases']:,} bases A C G T"]
        parts += [f"{count:,} {kind}" for kind, count in counts.items() if count]
        if foreign:
            most = ", ".join(f"'{printable(letter)}' {count:,}" for letter, count in list(foreign.items())[:5])
            fate = "made [UNK]" if record["options"]["foreign"] == "keep" else "cut out"
            parts[-1] += f" ({most}; {fate})"
        if file["empty_records"]:
            parts.append(f"{file['empty_records']:,} records without a sequence")
        yield f"{printable(file['name'])}: {', '.join(parts)}"
    for rule in record["unused_rules"]:
        yield f"no base matches the rule {printable(rule['pattern'])} of the split {rule['split']}"
    for split, count in record["splits"].items():
        yield f"{split:12} {count['examples']:>10,} examples {count['tokens']:>14,} tokens"
    for name, shares in record.items():
        if name.startswith("share_of_"):
            for split, share in shares.items():
                yield f"{split:12} {share:.2%} of its 31-mers also stand in train"
