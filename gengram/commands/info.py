"""`gengram info`: says what a checkpoint or folder is."""

import argparse
import json
from dataclasses import asdict

HELP = "say what a checkpoint or folder is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram info`."""
    parser.add_argument(
        "path", metavar="PATH", help="Megatron checkpoint or Hugging Face folder, or ORG/NAME[/FOLDER] on the Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; its main branch by default")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints what `PATH` is; returns the exit code, 1 if there is a problem."""
    from ..conversion_scripts.inspect_checkpoint import inspect_checkpoint
    from ..support.printable import printable_lines

    info = inspect_checkpoint(arguments.path, arguments.revision)
    print(json.dumps(asdict(info), indent=1) if arguments.json else printable_lines(info.summary()))
    return 1 if info.problem else 0
