"""The `gengram` command."""

import argparse
import sys
from collections.abc import Sequence

from . import demo, doctor
from ._version import __version__
from .commands import bench, prepare
from .conversion_scripts import (
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    diff_checkpoints,
    inspect_checkpoint,
    verify_conversion,
)
from .support.errors import MissingExtraError


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; each subcommand brings its own and a function `run(arguments) -> exit code`."""
    parser = argparse.ArgumentParser(prog="gengram", description="Gengram for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"gengram {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="convert checkpoints between formats")
    directions = convert.add_subparsers(title="directions", required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="Megatron checkpoint to Hugging Face folder")
    convert_megatron_to_hf.add_convert_arguments(to_hf)
    to_hf.set_defaults(run=convert_megatron_to_hf.run_convert)
    to_megatron = directions.add_parser("to-megatron", help="Hugging Face folder to Megatron checkpoint")
    convert_hf_to_megatron.add_back_arguments(to_megatron)
    to_megatron.set_defaults(run=convert_hf_to_megatron.run_back)

    info = commands.add_parser("info", help="say what a checkpoint or folder is")
    inspect_checkpoint.add_info_arguments(info)
    info.set_defaults(run=inspect_checkpoint.run_info)

    verify = commands.add_parser("verify", help="check a converted folder against its record and its source")
    verify_conversion.add_verify_arguments(verify)
    verify.set_defaults(run=verify_conversion.run_verify)

    diff = commands.add_parser("diff", help="compare the weights of two checkpoints or folders")
    diff_checkpoints.add_diff_arguments(diff)
    diff.set_defaults(run=diff_checkpoints.run_diff)

    for name, command in {"prepare": prepare, "bench": bench}.items():
        subparser = commands.add_parser(name, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)

    demonstrate = commands.add_parser("demo", help="convert a bundled checkpoint, and use the default model")
    demo.add_demo_arguments(demonstrate)
    demonstrate.set_defaults(run=demo.run_demo)

    examine = commands.add_parser("doctor", help="say what runs here: versions, devices, native kernels")
    doctor.add_doctor_arguments(examine)
    examine.set_defaults(run=doctor.run_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
