"""The `gengram` command: finds the subcommand, and says errors in one way for all."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from ._version import __version__
from .commands import (
    bench,
    convert,
    demo,
    diff,
    doctor,
    embed,
    explain,
    export,
    fill,
    generate,
    info,
    mutate,
    prepare,
    score,
    serve,
    track,
    verify,
)
from .support.errors import FetchError, MissingExtraError, plain_words
from .support.printable import printable_lines


class Command(Protocol):
    """What a module of `gengram/commands` holds. It imports the standard library only, and the rest in `run`."""

    HELP: str  # one line

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments, or commands of its own, to `parser`."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit code; errors that the user can mend are raised, not printed."""


COMMANDS: dict[str, Command] = {
    "convert": convert,
    "info": info,
    "verify": verify,
    "diff": diff,
    "score": score,
    "embed": embed,
    "track": track,
    "mutate": mutate,
    "explain": explain,
    "prepare": prepare,
    "fill": fill,
    "generate": generate,
    "serve": serve,
    "export": export,
    "bench": bench,
    "demo": demo,
    "doctor": doctor,
}
INTERRUPTED = 130  # as a shell reports Control-C


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; `run` of what it returns is the subcommand's."""
    parser = argparse.ArgumentParser(prog="gengram", description="Gengram for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"gengram {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    What the user can mend (a wrong value or file, a download that failed, a library that is missing) is one message
    on stderr and exit code 1. Any other exception keeps its traceback.
    """
    arguments = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal's encoding does not have are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FetchError, MissingExtraError) as error:
        words = plain_words(error) if isinstance(error, OSError) else str(error)
        _say(f"error: {words}", error)
        return getattr(error, "exit_code", 1)  # `diff` tells errors from differences
    except KeyboardInterrupt as interrupt:
        _say("interrupted", interrupt)
        return INTERRUPTED


def _say(message: str, error: BaseException) -> None:
    """Print `message` and the notes of `error`, such as what is kept for the next try, on lines of their own."""
    for text in (message, *getattr(error, "__notes__", ())):
        print(printable_lines(text), file=sys.stderr)
