"""`gengram bench`: evaluate models on a suite of tasks, beside baselines."""

import argparse

HELP = "evaluate models on a suite of tasks, beside baselines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram bench`."""
    from ..evaluation import bench_command

    bench_command.add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `gengram bench`; returns the exit code."""
    from ..evaluation import bench_command

    return bench_command.run_bench(arguments)
