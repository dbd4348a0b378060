"""The `gengram` command."""

import argparse
import os
import sys
from collections.abc import Sequence

from . import demo, doctor
from ._version import __version__
from .commands import convert, diff, info, verify
from .data_preparation import prepare_command
from .evaluation import bench_command
from .support.errors import FetchError, MissingExtraError


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; each subcommand brings its own and a function `run(arguments) -> exit code`."""
    parser = argparse.ArgumentParser(prog="gengram", description="Gengram for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"gengram {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for module in (convert, info, verify, diff):
        command = commands.add_parser(module.__name__.rpartition(".")[-1], help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    prepare = commands.add_parser("prepare", help="FASTA files to a tokenized data set")
    prepare_command.add_prepare_arguments(prepare)
    prepare.set_defaults(run=prepare_command.run_prepare)

    evaluate = commands.add_parser("bench", help="evaluate models on a suite of tasks, beside baselines")
    bench_command.add_bench_arguments(evaluate)
    evaluate.set_defaults(run=bench_command.run_bench)

    demonstrate = commands.add_parser("demo", help="convert a bundled checkpoint, and use the default model")
    demo.add_demo_arguments(demonstrate)
    demonstrate.set_defaults(run=demo.run_demo)

    examine = commands.add_parser("doctor", help="say what runs here: versions, devices, native kernels")
    doctor.add_doctor_arguments(examine)
    examine.set_defaults(run=doctor.run_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; what the user can mend is one message, without a traceback."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FetchError, MissingExtraError) as error:
        _print_error(f"error: {error}", error)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt as error:
        _print_error("interrupted", error)
        return 130


def _print_error(message: str, error: BaseException) -> None:
    print("\n".join([message, *getattr(error, "__notes__", ())]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
