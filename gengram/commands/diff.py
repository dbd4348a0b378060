"""`gengram diff`: compares the weights of two checkpoints or folders."""

import argparse
import json
from pathlib import Path

HELP = "compare the weights of two checkpoints or folders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram diff`."""
    parser.add_argument("first", type=Path, metavar="A", help="Megatron checkpoint or Hugging Face folder")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Prints how A and B differ; returns the exit code: 0 the same, 1 different; an error has the code 2."""
    from ..conversion_scripts.diff_checkpoints import diff_checkpoints
    from ..support.errors import plain_words
    from ..support.printable import printable_lines

    try:
        report = diff_checkpoints(arguments.first, arguments.second, progress=not (arguments.quiet or arguments.json))
    except (ValueError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": plain_words(error) if isinstance(error, OSError) else str(error)}))
        error.exit_code = 2  # type: ignore[union-attr]  # as of diff(1), where 1 means that they differ
        raise
    print(json.dumps(report.as_json(), indent=1) if arguments.json else printable_lines(report.summary()))
    return 0 if report.same else 1
