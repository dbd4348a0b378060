"""`gengram verify`: check a converted folder against its record and its source."""

import argparse

HELP = "check a converted folder against its record and its source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram verify`."""
    from ..conversion_scripts import verify_conversion

    verify_conversion.add_verify_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `gengram verify`; returns the exit code."""
    from ..conversion_scripts import verify_conversion

    return verify_conversion.run_verify(arguments)
