"""`gengram verify`: checks a converted folder against its record, its source and itself."""

import argparse
from pathlib import Path

HELP = "check a converted folder against its record and its source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram verify`."""
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder written by `gengram convert to-hf`")
    parser.add_argument(
        "--source", help="the Megatron checkpoint, a folder or on the Hub; the recorded folder by default"
    )
    parser.add_argument("--no-load", action="store_true", help="check the files only (needs little memory)")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was checked; a check that fails is an error. Returns the exit code."""
    from ..conversion_scripts.verify_conversion import verify_conversion
    from ..support.printable import printable_lines

    report = verify_conversion(arguments.output, arguments.source, load=not arguments.no_load)
    print(printable_lines(report.summary()))
    return 0
