"""`gengram diff`: compare the weights of two checkpoints or folders."""

import argparse

HELP = "compare the weights of two checkpoints or folders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram diff`."""
    from ..conversion_scripts import diff_checkpoints

    diff_checkpoints.add_diff_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `gengram diff`; returns the exit code."""
    from ..conversion_scripts import diff_checkpoints

    return diff_checkpoints.run_diff(arguments)
