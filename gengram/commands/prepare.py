"""`gengram prepare`: FASTA files to a tokenized data set."""

import argparse

HELP = "FASTA files to a tokenized data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram prepare`."""
    from ..data_preparation import prepare_command

    prepare_command.add_prepare_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `gengram prepare`; returns the exit code."""
    from ..data_preparation import prepare_command

    return prepare_command.run_prepare(arguments)
