"""`gengram convert`: checkpoints between formats."""

import argparse

HELP = "convert checkpoints between formats"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The directions of `gengram convert`, and the arguments of each."""
    from ..conversion_scripts import convert_hf_to_megatron, convert_megatron_to_hf

    directions = parser.add_subparsers(title="directions", required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="Megatron checkpoint to Hugging Face folder")
    convert_megatron_to_hf.add_convert_arguments(to_hf)
    to_hf.set_defaults(run_direction=convert_megatron_to_hf.run_convert)
    to_megatron = directions.add_parser("to-megatron", help="Hugging Face folder to Megatron checkpoint")
    convert_hf_to_megatron.add_back_arguments(to_megatron)
    to_megatron.set_defaults(run_direction=convert_hf_to_megatron.run_back)


def run(arguments: argparse.Namespace) -> int:
    """Convert in the direction asked for."""
    return arguments.run_direction(arguments)
