"""`gengram info`: say what a checkpoint or folder is."""

import argparse

HELP = "say what a checkpoint or folder is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram info`."""
    from ..conversion_scripts import inspect_checkpoint

    inspect_checkpoint.add_info_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `gengram info`; returns the exit code."""
    from ..conversion_scripts import inspect_checkpoint

    return inspect_checkpoint.run_info(arguments)
